"""Time of a round over Flower with an edge's long-lived process, and without it: then every message loads libraries, base and rows anew.

One edge on loopback with TLS and node authentication, one optimizer step a round, so that what is measured is the round about it. Both ways
take turns; figures are medians over all rounds but the first of each run, in which the resident loads its base, too (unless it is the only
one).

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

from atoll.fleet.files import EdgeFolder
from atoll.fleet.processes import Child, command, flower_environment, free_port

from tests.fleet.loopback import COORDINATOR, LoopbackFleet
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


def rounds_of(folder: Path, base: str, rounds: int, *, resident: bool) -> list[float]:
    """Seconds of every round but the first, or of the only one."""
    folder.mkdir()
    with LoopbackFleet(folder, run_toml(folder, base, rounds), ["north"], has_host=False) as fleet:
        fleet.start(COORDINATOR)
        if resident:
            fleet.start("north")
            fleet.wait(RUN_SECONDS)
        else:
            # A SuperNode gives up where SuperLink does not know it yet; `atoll fleet join` would start it again.
            known = folder / "fleet" / "coordinator" / "superlink" / "nodes.json"
            fleet.wait_until(known.exists, RUN_SECONDS)
            node = _node_alone(EdgeFolder(folder / "fleet" / "edges" / "north"))
            try:
                fleet.wait(RUN_SECONDS)
            finally:
                node.stop()
        lines = map(json.loads, (fleet.run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines())
        seconds = [line["seconds"] for line in lines if line["event"] == "round_finished"]
        return seconds[1:] or seconds


def _node_alone(edge: EdgeFolder) -> Child:
    """A SuperNode without a resident, as `flwr run` has it by itself."""
    home = edge.path / "flower"
    home.mkdir(exist_ok=True)
    return Child("SuperNode", [
        command("flower-supernode"), "--root-certificates", str(edge.ca), "--superlink", edge.read().superlink,
        "--auth-supernode-private-key", str(edge.node_key), "--node-config", f'edge="north" folder="{edge.path.resolve()}"',
        "--host", "127.0.0.1", "--port", str(free_port()),
    ], edge.path / "supernode.log", flower_environment(home.resolve()))  # fmt: skip


def main() -> None:
    """All bases, both ways in turn."""
    options = Options(__doc__)
    options.size("--base", ["tiny"], ["tiny"])
    options.size("--ways", list(WAYS), [WAYS[0]], choices=WAYS)
    options.size("--rounds", 4, 1)
    options.size("--repeats", 2, 1)
    given, rows = options.parse(), {}
    with tempfile.TemporaryDirectory(prefix="atoll-resident-") as name:
        for number, base in enumerate(given.base):
            source = base if base == "tiny" else str(Path(base).resolve())
            seconds: dict[str, list[float]] = {way: [] for way in given.ways}
            for repeat in range(given.repeats):
                for way, found in seconds.items():
                    found += rounds_of(Path(name) / f"{number}-{repeat}-{way}", source, given.rounds, resident=way == WAYS[0])
            medians = {way: statistics.median(found) for way, found in seconds.items()}
            ratio = max(medians.values()) / min(medians.values())
            rows[Path(base).name] = {"seconds": seconds, "median": medians, "ratio": ratio}
            said = ", ".join(f"{way} {value:.1f} s" for way, value in medians.items())
            print(f"{Path(base).name}: a round takes {said}: {ratio:.1f} times as long", flush=True)
    results.write(given.out, "resident_edge", {"rounds": given.rounds, "repeats": given.repeats}, rows)


if __name__ == "__main__":
    main()
