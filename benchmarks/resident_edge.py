"""Time of a round over a fleet that trains next to nothing: what SuperLink, the front before it and an edge's process take for themselves.

One edge on loopback, one optimizer step a round, so that what is measured is the round about it. Figures are medians over all rounds but
the first of each run, in which the edge loads its base, too.

Usage: python benchmarks/resident_edge.py [--base tiny MODEL_FOLDER ...] [--rounds 4] [--repeats 2]
"""

from __future__ import annotations

import argparse
import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}  # before torch

import json
import statistics
import sys
import tempfile
from pathlib import Path

from sides import results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # The fleet is that of the tests.

from tests.fleet.loopback import LoopbackFleet

RUN_SECONDS = 900.0


def run_toml(folder: Path, base: str, rounds: int) -> Path:
    """One edge, one step a round."""
    path = folder / "run.toml"
    path.write_text(
        f"""
[run]
rounds = {rounds}
[model]
base = "{base}"
[data]
train = "demo"
eval = "demo-eval"
prompt = "{{mr}} ->"
completion = " {{ref}}"
max_length = 64
train_rows = 40
eval_rows = 2
[train]
batch_size = 1
local_steps = 1
[[edge]]
name = "north"
mode = "local"
""",
        encoding="utf-8",
    )
    return path


def rounds_of(folder: Path, base: str, rounds: int) -> list[float]:
    """Seconds of every round but the first."""
    folder.mkdir()
    with LoopbackFleet(folder, run_toml(folder, base, rounds), ["north"], has_host=False) as fleet:
        fleet.start_all()
        fleet.wait(RUN_SECONDS)
        lines = map(json.loads, (fleet.run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines())
        return [line["seconds"] for line in lines if line["event"] == "round_finished"][1:]


def main() -> None:
    """All bases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", nargs="+", default=["tiny"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="atoll-resident-") as name:
        for number, base in enumerate(given.base):
            source = base if base == "tiny" else str(Path(base).resolve())
            seconds = list[float]()
            for repeat in range(given.repeats):
                seconds += rounds_of(Path(name) / f"{number}-{repeat}", source, given.rounds)
            rows[Path(base).name] = {"seconds": seconds, "median": statistics.median(seconds)}
            print(f"{Path(base).name}: a round takes {statistics.median(seconds):.1f} s", flush=True)
    results.write("resident_edge", {"rounds": given.rounds, "repeats": given.repeats}, rows)


if __name__ == "__main__":
    main()
