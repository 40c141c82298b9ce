"""The tree of errors, its drawing and docs/errors.md say the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from atoll import errors
from atoll.cli.pages import format_error
from atoll.errors import AtollError

SOURCE = Path(errors.__file__).parent
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
LEAVES = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AtollError) and kind.code}


def test_the_drawing_in_the_docstring_is_the_tree() -> None:
    drawn = dict(re.findall(r"(\w+Error)\s+([A-Z]\d{3}) ", errors.__doc__ or ""))
    here = {name: kind.code for name, kind in LEAVES.items() if kind.__module__ == "atoll.errors"}
    assert drawn == here


def test_codes_are_unique_and_every_leaf_has_an_exit_status() -> None:
    assert len({kind.code for kind in LEAVES.values()}) == len(LEAVES)
    assert {kind.exit_status for kind in LEAVES.values()} == {2, 3, 4}


def test_the_document_has_one_paragraph_for_every_code() -> None:
    headed = dict(re.findall(r"^### ([A-Z]\d{3}) ?(\w*)$", PAGE, flags=re.MULTILINE))
    assert headed == {kind.code: name for name, kind in LEAVES.items()} | {"X999": ""}
    for paragraph in re.split(r"^### .*$", PAGE, flags=re.MULTILINE)[1:]:
        assert len(paragraph.split("\n## ")[0].split()) > 12


def test_the_pages_that_are_shown_are_those_that_are_printed(tmp_path: Path, atoll: Callable[..., object]) -> None:
    (tmp_path / "run.toml").write_text("")
    (shown,) = re.findall(r"^```\n\$ atoll (.*)\n((?:.*\n)*?)```", PAGE, flags=re.MULTILINE)
    (values,) = re.findall(r"^```json\n((?:.*\n)*?)```", PAGE, flags=re.MULTILINE)
    assert atoll(*shown[0].split()).err == shown[1]
    assert atoll(*shown[0].split(), "--json").out == values


def test_every_error_is_raised_somewhere() -> None:
    """No paragraph of what cannot happen."""
    sources = [file.read_text(encoding="utf-8") for file in SOURCE.rglob("*.py") if file.name != "errors.py"]
    assert not [name for name in LEAVES if not any(re.search(rf"\b{name}\b(?!\.)[(,\]]", text) for text in sources)]


def test_every_page_renders() -> None:
    for kind in LEAVES.values():
        page = format_error(kind("it is wrong", where="run.toml, line 1", got="1", expected="2", do="write 2"))
        assert page.splitlines()[0] == f"error {kind.code}: it is wrong"
        assert page.splitlines()[-1] == "  do        write 2"


def test_a_part_of_several_lines_goes_on_below_itself() -> None:
    page = format_error(AtollError("it is wrong", got="1", expected="2 of north\n3 of south", do="write them"))
    assert page.splitlines()[1:] == ["  got       1", "  expected  2 of north", "            3 of south", "  do        write them"]
