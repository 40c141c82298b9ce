"""A GGUF file where a model folder is wanted, and what `atoll convert` needs. None of it takes the gguf package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from atoll.base.load import load_base
from atoll.base.read_shapes import read_shapes
from atoll.commands.models.convert import convert
from atoll.errors import BaseFolderError, UnavailableError


@pytest.mark.parametrize("where", ["file", "folder", "beside config.json"])
def test_a_file_where_a_base_is_wanted_is_refused_with_the_command(where: str, tmp_path: Path) -> None:
    path = tmp_path / "the model.gguf"
    path.touch()
    if where == "beside config.json":
        (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    # A run reads the shapes first, and with config.json there are some to read.
    for read in (read_shapes, load_base)[: 1 if where == "beside config.json" else 2]:
        with pytest.raises(BaseFolderError) as caught:
            read(str(path if where == "file" else tmp_path))
        assert f"atoll convert '{path}' --out '{tmp_path / 'the model'}'" in caught.value.page()


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnavailableError) as caught:
        convert(path, out=tmp_path / "m")
    assert "pip install 'atoll[gguf]'" in caught.value.page()


def test_one_file_is_wanted(tmp_path: Path) -> None:
    for names, got in (((), "a folder without one"), (("a.gguf", "b.gguf"), "a.gguf, b.gguf")):
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(BaseFolderError) as caught:
            convert(tmp_path, out=tmp_path / "m")
        assert got in caught.value.page()
