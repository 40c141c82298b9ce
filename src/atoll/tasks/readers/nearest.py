"""Names in messages: the valid one closest to what the user wrote, and a list that stays short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """What to do about an unknown name: the nearest valid one, or else `otherwise`."""
    known = {candidate.casefold(): candidate for candidate in names}
    near = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.5)
    return f"did you mean {known[near[0]]!r}?" if near else otherwise


def few_names(names: Iterable[str], most: int = 12) -> str:
    """Names on one line, of many the first."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "") if listed else "none"
