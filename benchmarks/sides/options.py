"""The command line of a benchmark: its sizes, each beside the smallest it runs at, and the folder of its results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
BUILD = BENCHMARKS.parent / "build"


class Options(argparse.ArgumentParser):
    """Options of one script, with --quick, --out and, where it has a `work` folder, --work; `parse` reads them."""

    def __init__(self, doc: str | None, work: str | None = None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self._quick: dict[str, Any] = {}
        self.add_argument("--quick", action="store_true", help="all sizes at their smallest, only to see that it runs")
        self.add_argument("--out", type=Path, metavar="FOLDER", help="of results (benchmarks/results, or with --quick build/quick)")
        self._work = work
        if work is not None:
            self.add_argument("--work", type=Path, metavar="FOLDER", help=f"of runs on the way (build/{work}; with --quick below --out)")

    def size(self, flag: str, usual: Any, quick: Any, *, choices: Sequence[Any] | None = None, help: str | None = None) -> None:
        """Add an option whose default is the first value, and with --quick the second; of lists it takes any number of values."""
        if isinstance(usual, bool):
            added = self.add_argument(flag, action=argparse.BooleanOptionalAction, default=usual, help=help)
        else:
            is_list = isinstance(usual, list)
            kind = type((usual or quick)[0] if is_list else usual)
            added = self.add_argument(flag, type=kind, nargs="*" if is_list else None, default=usual, choices=choices, help=help)
        self._quick[added.dest] = quick

    def parse(self) -> argparse.Namespace:
        """What the command line says."""
        if "--quick" in sys.argv[1:]:
            self.set_defaults(**self._quick)
        given = self.parse_args()
        given.out = given.out or (BUILD / "quick" if given.quick else BENCHMARKS / "results")
        if self._work is not None:
            given.work = given.work or (given.out if given.quick else BUILD) / self._work
        return given
