"""Time of a round over a fleet that trains next to nothing: what SuperLink, the front before it and an edge's process take for themselves.


One edge on loopback, one optimizer step a round, so that what is measured is the round about it. Figures are medians over all rounds but
the first of each run, in which the edge loads its base, too (unless it is the only one).

Usage: python benchmarks/resident_edge.py [--base tiny MODEL_FOLDER ...] [--rounds 4] [--repeats 2]
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}  # before torch

import json
import statistics
import sys
import tempfile
from pathlib import Path

from sides import results
from sides.options import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # The fleet is that of the tests.

from tests.fleet.loopback import LoopbackFleet
from tests.run_files import DEMO, Sections, write_run

RUN_SECONDS = 900.0
WAYS = ("resident", "alone")
"""With the edge's own process, and with a SuperNode only."""


def run_toml(folder: Path, base: str, rounds: int) -> Path:
    """One edge, one step a round."""
    sections: Sections = {
        "run": {"rounds": rounds}, "model": {"base": base}, "train": {"batch_size": 1, "local_steps": 1},
        "data": {"eval": "demo-eval", "max_length": 64, "train_rows": 40, "eval_rows": 2},
    }  # fmt: skip
    return write_run(folder, sections, {"north": {"mode": "local"}}, over=DEMO)


def rounds_of(folder: Path, base: str, rounds: int) -> list[float]:
    """Seconds of every round but the first, or of the only one."""
    folder.mkdir()
    with LoopbackFleet(folder, run_toml(folder, base, rounds), ["north"], has_host=False) as fleet:
        fleet.start_all()
        fleet.wait(RUN_SECONDS)
        lines = map(json.loads, (fleet.run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines())
        seconds = [line["seconds"] for line in lines if line["event"] == "round_finished"]
        return seconds[1:] or seconds


def main() -> None:
    """All bases."""
    options = Options(__doc__)
    options.size("--base", ["tiny"], ["tiny"])
    options.size("--rounds", 4, 1)
    options.size("--repeats", 2, 1)
    given, rows = options.parse(), {}
    with tempfile.TemporaryDirectory(prefix="atoll-resident-") as name:
        for number, base in enumerate(given.base):
            source = base if base == "tiny" else str(Path(base).resolve())
            seconds = list[float]()
            for repeat in range(given.repeats):
                seconds += rounds_of(Path(name) / f"{number}-{repeat}", source, given.rounds)
            rows[Path(base).name] = {"seconds": seconds, "median": statistics.median(seconds)}
            print(f"{Path(base).name}: a round takes {statistics.median(seconds):.1f} s", flush=True)
    results.write(given.out, "resident_edge", {"rounds": given.rounds, "repeats": given.repeats}, rows)


if __name__ == "__main__":
    main()
