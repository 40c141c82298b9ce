"""Text that somebody else wrote, made fit for a terminal and for a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line: whatever is no visible character (line ends, escapes, signs that turn the direction) as Python writes it.

    >>> printable("north\\x1b[2J\\nsouth")
    'north\\\\x1b[2J\\\\nsouth'
    """
    return text if text.isprintable() else "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
