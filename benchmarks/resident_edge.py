"""Time of a round over Flower with an edge's long-lived process, and without it: then every message loads libraries, base and rows anew.

One edge on loopback with TLS and node authentication, one optimizer step a round, so that what is measured is the round about it. Both ways
take turns; figures are medians over all rounds but the first of each run, in which the resident loads its base, too.

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

from atoll.fleet.files import EdgeFolder
from atoll.fleet.processes import Child, command, flower_environment, free_port

from tests.fleet.loopback import COORDINATOR, LoopbackFleet

RUN_SECONDS = 900.0


def run_toml(folder: Path, base: str, rounds: int) -> Path:
    """One edge, one step a round."""
    path = folder / "run.toml"
    path.write_text(f"""
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
""", encoding="utf-8")
    return path


def rounds_of(folder: Path, base: str, rounds: int, *, resident: bool) -> list[float]:
    """Seconds of every round but the first."""
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
        return [line["seconds"] for line in lines if line["event"] == "round_finished"][1:]


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", nargs="+", default=["tiny"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="atoll-resident-") as name:
        for number, base in enumerate(given.base):
            source = base if base == "tiny" else str(Path(base).resolve())
            seconds: dict[str, list[float]] = {"resident": [], "alone": []}
            for repeat in range(given.repeats):
                for way, found in seconds.items():
                    found += rounds_of(Path(name) / f"{number}-{repeat}-{way}", source, given.rounds, resident=way == "resident")
            medians = {way: statistics.median(found) for way, found in seconds.items()}
            rows[Path(base).name] = {"seconds": seconds, "median": medians, "ratio": medians["alone"] / medians["resident"]}
            said = ", ".join(f"{way} {value:.1f} s" for way, value in medians.items())
            print(f"{Path(base).name}: a round takes {said}: {rows[Path(base).name]['ratio']:.1f} times as long without", flush=True)
    results.write("resident_edge", {"rounds": given.rounds, "repeats": given.repeats}, rows)


if __name__ == "__main__":
    main()
