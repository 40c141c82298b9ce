"""Kill processes of a fleet at random instants, start them again, and see whether the run comes to the same bits.

A fleet on loopback (a host, two edges with the whole base and one without) trains a few rounds. A coordinator, an edge, the host,
SuperLink or the front before it is ended by signal 9 after a random number of events, and started again as a person would: `atoll resume`,
`atoll fleet join`, `atoll host`; SuperLink and the front come back by themselves. At the end the adapter is compared with that of the same
run in one process, byte for byte.

Usage: python benchmarks/chaos.py [--kills 30] [--runs 5] [--seed 0] [--victims coordinator host ...]
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}  # before torch

import hashlib
import random
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from sides import results
from sides.options import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # The fleet is that of the tests.

from atoll.commands.train import train

from tests.fleet.loopback import COORDINATOR, FRONT, HOST, SUPERLINK, LoopbackFleet
from tests.run_files import merged, write_run

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "fleet" / "run.toml"
EDGES = ["north", "south", "west"]
VICTIMS = [COORDINATOR, *EDGES, HOST, SUPERLINK, FRONT]
SPLIT = "west"
"""The one that trains against the host."""
ROUND_SECONDS = 900.0


def digest(run: Path) -> str:
    """Of the adapter that a run came to."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def config(folder: Path, names: list[str], rounds: int, local_steps: int) -> Path:
    """The example's run of these edges, of such length."""
    example = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    edges = {edge.pop("name"): edge for edge in example.pop("edge")}
    sizes = {"run": {"rounds": rounds}, "train": {"local_steps": local_steps}, "data": {"eval_rows": 16, "train_rows": 200}}
    enough = {"federated": {"min_edges": min(len(names), example["federated"]["min_edges"])}}
    return write_run(folder, merged(example, sizes | enough), {name: edges[name] for name in names}, over={})


def one_run(
    folder: Path, config: Path, edges: list[str], kills: int, most_steps: int, victims: list[str], draw: random.Random
) -> dict[str, Any]:
    """A run with so many kills, if it does not end before."""
    done: list[dict[str, Any]] = []
    begin = time.monotonic()
    with LoopbackFleet(folder, config, edges, has_host=SPLIT in edges) as fleet:
        fleet.start_all()
        for _ in range(kills):
            after = fleet.num_events + draw.randint(1, most_steps)
            if not fleet.wait_until(lambda after=after: fleet.num_events >= after, ROUND_SECONDS):  # type: ignore[misc]
                break
            time.sleep(draw.uniform(0.0, 0.3))
            victim, struck = draw.choice(victims), time.monotonic()
            fleet.kill(victim)
            if victim in fleet.processes:
                fleet.start(victim)
            events = fleet.num_events
            went_on = fleet.wait_until(lambda events=events: fleet.num_events > events, ROUND_SECONDS)  # type: ignore[misc]
            seconds = round(time.monotonic() - struck, 1) if went_on else None
            done.append({"victim": victim, "after_events": after, "seconds_to_next_event": seconds})
            print(f"  {victim} killed after {after} events; the next came {seconds} s later", flush=True)
        fleet.wait(ROUND_SECONDS)
        return {"kills": done, "digest": digest(fleet.run_dir), "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    """All runs, and the comparison."""
    options = Options(__doc__)
    options.size("--kills", 30, 1)
    options.size("--runs", 5, 1)
    options.add_argument("--seed", type=int, default=0)
    options.size("--rounds", 4, 1)
    options.size("--local-steps", 6, 2)
    options.size("--edges", EDGES, [SPLIT], choices=EDGES)
    options.size("--victims", VICTIMS, [HOST], choices=VICTIMS)
    given = options.parse()
    draw, runs = random.Random(given.seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="atoll-chaos-") as name:
        work = Path(name)
        asked = config(work, given.edges, given.rounds, given.local_steps)
        undisturbed = digest(train(asked, out=work / "here").run_dir)
        left = given.kills
        while left > 0:
            folder = work / f"run-{len(runs)}"
            folder.mkdir()
            print(f"run {len(runs) + 1}", flush=True)
            kills = min(left, -(-given.kills // given.runs))
            runs.append(one_run(folder, asked, given.edges, kills, 3 * given.local_steps, given.victims, draw))
            left -= len(runs[-1]["kills"])
            same = runs[-1]["digest"] == undisturbed
            words = "the same bits" if same else "OTHER BITS"
            print(f"run {len(runs)}: {len(runs[-1]['kills'])} kills, {words}, {runs[-1]['seconds']} s", flush=True)
    equal = sum(run["digest"] == undisturbed for run in runs)
    kills_done = [kill for run in runs for kill in run["kills"]]
    print(f"{len(kills_done)} kills in {len(runs)} runs; {equal} runs ended with the bits of an undisturbed one")
    name = "chaos" if given.victims == VICTIMS else f"chaos_{'_'.join(given.victims)}"
    settings = {key: getattr(given, key) for key in ("kills", "runs", "seed", "rounds", "local_steps", "edges", "victims")}
    results.write(given.out, name, settings | {"undisturbed": undisturbed}, {"runs": runs})
    sys.exit(0 if equal == len(runs) else 1)


if __name__ == "__main__":
    main()
