"""Kill processes of a fleet at random instants, start them again, and see whether the run comes to the same bits.

A fleet on loopback (a host, two edges with the whole base and one without) trains a few rounds. A coordinator, an edge, the host,
SuperLink or the front before it is ended by signal 9 after a random number of events, and started again as a person would: `atoll resume`,
`atoll fleet join`, `atoll host`; SuperLink and the front come back by themselves. At the end the adapter is compared with that of the same
run in one process, byte for byte.

Usage: python benchmarks/chaos.py [--kills 30] [--runs 5] [--seed 0] [--victims coordinator host ...]
"""

from __future__ import annotations

import argparse
import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}  # before torch

import hashlib
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sides import results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # The fleet is that of the tests.

from atoll.commands.train import train

from tests.fleet.loopback import COORDINATOR, FRONT, HOST, SUPERLINK, LoopbackFleet

ROOT = Path(__file__).resolve().parents[1]
EDGES = ["north", "south", "west"]
VICTIMS = [COORDINATOR, *EDGES, HOST, SUPERLINK, FRONT]
ROUND_SECONDS = 900.0


def digest(run: Path) -> str:
    """Of the adapter that a run came to."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def one_run(folder: Path, config: Path, kills: int, most_steps: int, victims: list[str], draw: random.Random) -> dict[str, Any]:
    """A run with so many kills, if it does not end before."""
    done: list[dict[str, Any]] = []
    begin = time.monotonic()
    with LoopbackFleet(folder, config, EDGES, has_host=True) as fleet:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--local-steps", type=int, default=6)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS, metavar="NAME", help=", ".join(VICTIMS))
    given = parser.parse_args()
    draw, runs = random.Random(given.seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="atoll-chaos-") as name:
        work = Path(name)
        text = (ROOT / "examples" / "fleet" / "run.toml").read_text(encoding="utf-8")
        text = text.replace("rounds = 3", f"rounds = {given.rounds}").replace("local_steps = 5", f"local_steps = {given.local_steps}")
        text = text.replace("max_length = 64", "max_length = 64\neval_rows = 16\ntrain_rows = 200")
        (work / "run.toml").write_text(text, encoding="utf-8")
        undisturbed = digest(train(work / "run.toml", out=work / "here").run_dir)
        left = given.kills
        while left > 0:
            folder = work / f"run-{len(runs)}"
            folder.mkdir()
            print(f"run {len(runs) + 1}", flush=True)
            kills = min(left, -(-given.kills // given.runs))
            runs.append(one_run(folder, work / "run.toml", kills, 3 * given.local_steps, given.victims, draw))
            left -= len(runs[-1]["kills"])
            same = runs[-1]["digest"] == undisturbed
            words = "the same bits" if same else "OTHER BITS"
            print(f"run {len(runs)}: {len(runs[-1]['kills'])} kills, {words}, {runs[-1]['seconds']} s", flush=True)
    equal = sum(run["digest"] == undisturbed for run in runs)
    kills_done = [kill for run in runs for kill in run["kills"]]
    print(f"{len(kills_done)} kills in {len(runs)} runs; {equal} runs ended with the bits of an undisturbed one")
    name = "chaos" if given.victims == VICTIMS else f"chaos_{'_'.join(given.victims)}"
    results.write(name, {**vars(given), "undisturbed": undisturbed}, {"runs": runs})
    sys.exit(0 if equal == len(runs) else 1)


if __name__ == "__main__":
    main()
