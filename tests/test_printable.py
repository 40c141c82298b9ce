"""What peers and files say never moves a terminal's cursor and never begins a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import FrameError
from atoll.printable import printable


@pytest.mark.parametrize(("text", "shown"), [
    ("north", "north"), ("Klinik Süd 3", "Klinik Süd 3"), ("", ""), ("a\nb\r\tc", "a\\nb\\r\\tc"), ("\x1b[2J\x07", "\\x1b[2J\\x07"),
    ("\x9b2J", "\\x9b2J"), ("a\0b", "a\\x00b"), ("\u202egnp.exe", "\\u202egnp.exe"), ("a\u2028b\u2066", "a\\u2028b\\u2066"),
    ("\udc80", "\\udc80"), ("北\U000e0041", "北\\U000e0041"),
])  # fmt: skip
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_it_is_one_line_of_visible_characters_and_stays_so(text: str) -> None:
    once = printable(text)
    assert once.isprintable()
    assert printable(once) == once


def test_no_part_of_a_page_acts_on_the_terminal_or_looks_like_another_part() -> None:
    evil = "x\n  do        run this\x1b]0;title\x07\x1b[1A"
    page = FrameError(evil, where=evil, got=evil, expected=evil, do="do right").page()
    assert page.replace("\n", "").isprintable()
    assert [line for line in page.splitlines() if line.startswith("  do ")] == ["  do        do right"]
