"""JSON and TOML that anybody may have written, parsed: whatever is wrong with them is a ValueError."""

from __future__ import annotations

import json
import tomllib
from typing import Any

DEPTH = 100
"""Lists and objects within each other; what reads them further calls itself at each."""


def parse_json(text: str | bytes) -> Any:
    """Raises: ValueError for what is no JSON, is not UTF-8, is nested deeper than `DEPTH` or has integers of thousands of digits."""
    try:
        return _shallow(json.loads(text))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def parse_toml(text: str) -> dict[str, Any]:
    """Raises: tomllib.TOMLDecodeError, a ValueError, for what is no TOML, and as above."""
    try:
        table: dict[str, Any] = _shallow(tomllib.loads(text))
        return table
    except RecursionError:
        raise tomllib.TOMLDecodeError(_TOO_DEEP) from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as problem:
        raise tomllib.TOMLDecodeError(str(problem)) from None


_TOO_DEEP = f"nested more than {DEPTH} deep"


def is_too_deep(value: Any) -> bool:
    """Whether a value that was parsed otherwise is nested deeper than `DEPTH`."""
    try:
        _shallow(value)
    except RecursionError:
        return True
    return False


def _shallow(value: Any) -> Any:
    level: list[Any] = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise RecursionError


def _inside(value: Any) -> list[Any]:
    found = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in found if isinstance(one, dict | list)]
