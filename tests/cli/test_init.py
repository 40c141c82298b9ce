"""`atoll init`: a folder that trains as it is."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import atoll.embedded
from atoll.config.load import load_config

ROWS = 'owner,prompt,completion\nnorth,"a, b ->", c\nsouth,d ->, e\nnorth,f ->, g\n'


@pytest.fixture(autouse=True)
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three rows of two owners in the place of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "rows.csv").write_text(ROWS)
    monkeypatch.setattr(atoll.embedded, "demo_path", lambda name: folder / "rows.csv", raising=False)
    monkeypatch.delitem(sys.modules, "atoll.commands.init", raising=False)


def test_a_folder_to_start_from(atoll: Callable[..., object], tmp_path: Path) -> None:
    outcome = atoll("init", "new/clinics")
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "next: atoll train new/clinics/run.toml"
    folder = tmp_path / "new" / "clinics"
    assert sorted(entry.name for entry in folder.iterdir()) == ["eval.csv", "run.toml", "train.csv"]
    assert (folder / "train.csv").read_text() == ROWS
    config = load_config(folder / "run.toml")
    assert (config.data.train, config.data.eval, config.data.partition) == ("train.csv", "eval.csv", "by:owner")
    assert (config.data.prompt, config.data.completion) == ("{prompt}", "{completion}")
    assert [edge.name for edge in config.edge] == ["north", "south"]


def test_the_file_says_what_every_key_means(atoll: Callable[..., object], tmp_path: Path) -> None:
    atoll("init", "a", "--full")
    text = (tmp_path / "a" / "run.toml").read_text()
    assert "#weight_decay = 0.0" in text
    assert "# Peak learning rate of AdamW.\nlearning_rate = 0.008" in text
    tomllib.loads(text)


def test_a_short_file_has_what_the_full_one_sets(atoll: Callable[..., object], tmp_path: Path) -> None:
    atoll("init", "a")
    atoll("init", "b", "--full")
    assert load_config(tmp_path / "a" / "run.toml") == load_config(tmp_path / "b" / "run.toml")
    lines = (tmp_path / "a" / "run.toml").read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith("#")]) <= 25
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("found", ["folder", "file"])
def test_what_is_there_is_left_alone(found: str, atoll: Callable[..., object], tmp_path: Path) -> None:
    if found == "folder":
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine.txt").write_text("mine")
    else:
        (tmp_path / "a").write_text("mine")
    outcome = atoll("init", "a")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("error R502")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
