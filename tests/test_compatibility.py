"""The table of families in docs/compatibility.md says what happens: some families of each kind here, all of them by its script."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compatibility import COLUMNS, row
from tests.families import NAMES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
SOME = ["llama", "gpt2", "deepseek_v3", "gpt_oss", "mamba", "rwkv", "falcon, 7b", "gemma3n_text", "gemma3", "llama4"]


def table() -> dict[str, tuple[str, ...]]:
    text = PAGE.read_text(encoding="utf-8").partition("<!-- families: begin -->")[2].partition("<!-- families: end -->")[0]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.strip().splitlines()]
    assert rows[0] == ("family", *COLUMNS)
    return {name: tuple(cells) for name, *cells in rows[2:]}


def test_every_family_has_a_line() -> None:
    assert tuple(table()) == NAMES
    assert all(cell for cells in table().values() for cell in cells)


@pytest.mark.parametrize("name", SOME)
def test_a_line_says_what_happens(tmp_path: Path, name: str) -> None:
    assert row(name, tmp_path) == table()[name]
