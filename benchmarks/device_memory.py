"""Memory of a device whose middle blocks run in a host, beside local training of the same model: measured, and as the plan foretells it.

Same random Llama of 100 M, same batch, same adapters. Every measurement is a process of its own, and the host is a third one.

Usage: python benchmarks/device_memory.py [--steps 4] [--repeats 3] [--model 100M]
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets  # noqa: F401  what a run has loaded besides
import flwr.app  # noqa: F401
import psutil
import rich.progress  # noqa: F401

from atoll.base.load import Base, load_base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Adapter, Cut, Data, Edge, Model, RunConfig, Train
from atoll.cost.meters import PeakMemory, resident_bytes, resident_peak_bytes
from atoll.jobs.split import HostAccess, join
from atoll.planner.plan_fleet import plan_fleet
from atoll.tasks.batches import Batch
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState
from sides import results, task
from split_step import RANK, ROWS, SIZES, TOKENS, adapters, batch, host

CASES: dict[str, int | None] = {"local": None, "cut 0-0": 0, "cut 1-0": 1}
"""Blocks that the device keeps in front; None: all blocks, and no host."""


class SameBatch:
    """The same batch for every step."""

    def __init__(self) -> None:
        self.only = batch()

    def batch(self, step: int) -> Batch:
        """The batch."""
        return self.only


def config(front: int | None) -> RunConfig:
    """What a run of this case would be told."""
    return RunConfig(
        model=Model(cut=Cut(front=front or 0, back=0)), data=Data(max_length=TOKENS), train=Train(batch_size=ROWS),
        adapter=Adapter(targets=("q_proj", "k_proj", "v_proj"), rank=RANK),
        edge=(Edge(name="device", mode="local" if front is None else "split"),),
    )  # fmt: skip


def foretold(folder: Path, front: int | None) -> int:
    """The peak as `atoll plan` has it."""
    return plan_fleet(config(front), read_shapes(str(folder)), {"device": 1000}).edge("device").predicted_peak_bytes


def child(folder: Path, front: int | None, address: str, steps: int) -> None:
    """Train a few steps and print the memory of this process: after its imports, with its base, between steps, and at its largest."""
    libraries = resident_bytes()
    if front is None:
        row = train(load_base(str(folder)), folder, steps)
    else:
        side = join(str(folder), config(front), HostAccess(address), ROWS * TOKENS)
        row = train(side.base, folder, steps, side.client.retrying)
        side.close()
    print(json.dumps({"libraries_bytes": libraries} | row))


def train(base: Base, folder: Path, steps: int, attempt: Callable | None = None) -> dict[str, int]:
    """The memory of training, in this process."""
    loaded, loading_peak = resident_bytes(), resident_peak_bytes()
    between: list[int] = []
    trainer = LocalTrainer(base, Train(), steps, 0.0, 0, "device", attempt or (lambda step: step()))
    with PeakMemory() as peak:
        trainer.fit(TrainState(adapters(folder, "all"), {}, 0), SameBatch(), FitPlan(steps, 1, False),
                    lambda report: between.append(resident_bytes()))  # fmt: skip
    # The first step loads what is loaded lazily.
    steady = int(statistics.median(between[1:]))
    return {"loaded_bytes": loaded, "loading_peak_bytes": loading_peak, "steady_bytes": steady, "peak_bytes": peak.num_bytes}


def measure(folder: Path, front: int | None, address: str, steps: int) -> dict[str, int]:
    """One process's figures."""
    command = [sys.executable, __file__, "--child", str(folder), "--front", str(front), "--address", address, "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and write; or be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="100M", choices=sorted(SIZES))
    parser.add_argument("--child", type=Path)
    parser.add_argument("--front", default="None")
    parser.add_argument("--address", default="")
    given = parser.parse_args()
    if given.child is not None:
        child(given.child, None if given.front == "None" else int(given.front), given.address, given.steps)
        return
    rows: dict[str, list[dict[str, int]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task.random_llama(folder, SIZES[given.model])
        with host(folder) as address:
            process = next(p for p in psutil.Process().children() if "host" in p.cmdline())
            for _ in range(given.repeats):
                for case, front in CASES.items():
                    rows[case].append(measure(folder, front, address, given.steps))
            host_bytes = process.memory_info().rss
        predicted = {case: foretold(folder, front) for case, front in CASES.items()}
    found = {case: summary(rows[case], predicted[case]) for case in CASES}
    for case, row in found.items():
        row["peak_to_local"] = row["peak_bytes"] / found["local"]["peak_bytes"]
        row["steady_to_local"] = row["steady_bytes"] / found["local"]["steady_bytes"]
        print(f"{case:8}", " ".join(f"{key} {value / 1e6 if key.endswith('bytes') else value:.4g}" for key, value in row.items()))
    settings = {"model": given.model, "rows": ROWS, "tokens": TOKENS, "rank": RANK, "steps": given.steps, "repeats": given.repeats}
    results.write("device_memory", settings, {"medians": found, "host_bytes": host_bytes, "repeats": rows})


def summary(rows: list[dict[str, int]], predicted_bytes: int) -> dict[str, float]:
    """Medians of one case, beside what was foretold."""
    medians: dict[str, float] = {key: int(statistics.median(row[key] for row in rows)) for key in rows[0]}
    return medians | {"predicted_bytes": predicted_bytes, "predicted_to_peak": predicted_bytes / medians["peak_bytes"]}


if __name__ == "__main__":
    main()
