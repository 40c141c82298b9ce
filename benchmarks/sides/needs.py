"""What a benchmark cannot do without: where it is absent, the process ends with a status that says so, and not as one that failed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

SHARED = Path(__file__).resolve().parents[3] / "shared"
ABSENT = 77
"""The status by which test runners know what was left out (Automake's)."""


def shared(*parts: str) -> Path:
    """A file or folder of the real models and data in ../shared, beside the project's folder."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        leave(f"{'/'.join(parts)} in ../shared, beside the project's folder")
    return path


def package(name: str) -> None:
    """Go on where it is installed."""
    if find_spec(name) is None:
        leave(f"the package {name}")


def leave(what: str) -> NoReturn:
    """End as left out."""
    print(f"left out: needs {what}", file=sys.stderr)
    sys.exit(ABSENT)
