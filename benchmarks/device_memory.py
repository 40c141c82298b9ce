"""Memory of a device whose middle blocks run in a host, beside local training of the same model: measured, and as the plan foretells it.

Same random Llama of 100 M, same batch, same adapters. Every measurement is a process of its own, and the host is a third one.

Usage: python benchmarks/device_memory.py [--steps 4] [--repeats 3] [--model 100M]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Adapter, Cut, Data, Edge, Model, RunConfig, Train
from atoll.planner.plan_fleet import plan_fleet
from sides import child, results, task
from sides.host import RANK, ROWS, TOKENS, host
from sides.options import Options

if TYPE_CHECKING:
    from atoll.tasks.batches import Batch

CASES: dict[str, int | None] = {"local": None, "cut 0-0": 0, "cut 1-0": 1}
"""Blocks that the device keeps in front; None: all blocks, and no host."""


class SameBatch:
    """The same batch for every step."""

    def __init__(self, batch: Batch) -> None:
        self.only = batch

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


def measure(folder: str, front: int | None, address: str, steps: int) -> dict[str, int]:
    """Train a few steps; the memory of this process after its imports, with its base, between steps, and at its largest."""
    import datasets  # noqa: F401  what a run has loaded besides
    import flwr.app  # noqa: F401
    import rich.progress  # noqa: F401

    from atoll.base.load import load_base
    from atoll.cost.meters import PeakMemory, resident_bytes, resident_peak_bytes
    from atoll.jobs.split import HostAccess, join
    from atoll.training.local_trainer import LocalTrainer
    from atoll.training.trainer import FitPlan, TrainState
    from sides.device import adapters, batch

    libraries = resident_bytes()
    side = None if front is None else join(folder, config(front), HostAccess(address), ROWS * TOKENS)
    base = load_base(folder) if side is None else side.base
    loaded, loading_peak = resident_bytes(), resident_peak_bytes()
    between: list[int] = []
    state, batches = TrainState(adapters(Path(folder), "all"), {}, 0), SameBatch(batch(base.model.config.vocab_size))
    attempt = (lambda step: step()) if side is None else side.client.retrying
    trainer = LocalTrainer(base, Train(), steps, 0.0, 0, "device", attempt)
    with PeakMemory() as peak:
        trainer.fit(state, batches, FitPlan(steps, 1, False), lambda report: between.append(resident_bytes()))
    if side is not None:
        side.close()
    # The first step loads what is loaded lazily.
    steady = int(statistics.median(between[1:]))
    return {
        "libraries_bytes": libraries, "loaded_bytes": loaded, "loading_peak_bytes": loading_peak, "steady_bytes": steady,
        "peak_bytes": peak.num_bytes,
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    options = Options(__doc__)
    options.size("--steps", 4, 2)
    options.size("--repeats", 3, 1)
    options.size("--model", "100M", task.TINY)
    options.size("--cases", list(CASES), ["cut 0-0"], choices=tuple(CASES))
    given = options.parse()
    rows: dict[str, list[dict[str, int]]] = {case: [] for case in given.cases}
    with tempfile.TemporaryDirectory() as name:
        folder = task.model_folder(given.model, Path(name))
        with host(folder) as address:
            process = next(p for p in psutil.Process().children() if "host" in p.cmdline())
            for _ in range(given.repeats):
                for case, measured in rows.items():
                    measured.append(child.figures(__file__, str(folder), CASES[case], address, given.steps))
            host_bytes = process.memory_info().rss
        found = {case: summary(measured, foretold(folder, CASES[case])) for case, measured in rows.items()}
    for case, row in found.items():
        first = found[given.cases[0]]
        row |= {f"{what}_to_{given.cases[0]}": row[f"{what}_bytes"] / first[f"{what}_bytes"] for what in ("peak", "steady")}
        print(f"{case:8}", " ".join(f"{key} {value / 1e6 if key.endswith('bytes') else value:.4g}" for key, value in row.items()))
    settings = {"model": given.model, "rows": ROWS, "tokens": TOKENS, "rank": RANK, "steps": given.steps, "repeats": given.repeats}
    results.write(given.out, "device_memory", settings, {"medians": found, "host_bytes": host_bytes, "repeats": rows})


def summary(rows: list[dict[str, int]], predicted_bytes: int) -> dict[str, float]:
    """Medians of one case, beside what was foretold."""
    medians: dict[str, float] = {key: int(statistics.median(row[key] for row in rows)) for key in rows[0]}
    return medians | {"predicted_bytes": predicted_bytes, "predicted_to_peak": predicted_bytes / medians["peak_bytes"]}


if __name__ == "__main__":
    child.run(main, measure)
