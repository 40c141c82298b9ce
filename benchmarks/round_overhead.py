"""What a round of the in-process grid costs beyond training: the round's time less the time inside Trainer.fit, for each edge.

stories260K, LoRA of rank 8 on all 35 projections, Adam moments kept from round to round: the heaviest messages of the demo's kind.

Usage: python benchmarks/round_overhead.py
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState
from atoll.base.load import load_base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Train
from atoll.cost.meters import PeakMemory
from atoll.cost.work import Work
from atoll.federated import client, store, strategy
from atoll.federated.aggregation.edge_parts import EdgeParts
from atoll.federated.aggregation.spool import Spool
from atoll.federated.client import EdgeWork, client_app
from atoll.federated.flower import ConfigRecord
from atoll.federated.grid import InProcessGrid
from atoll.federated.store import EdgeStates
from atoll.federated.strategy import AdapterStrategy, Observer
from atoll.tasks.batches import BatchStream
from atoll.tasks.rows import load_rows
from atoll.tasks.text import text_form
from atoll.tasks.tokens import Examples, pad_id, tokenize
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import Batches, FitPlan, StepReport, TrainState, Update
from sides import results, task
from sides.meter import Parts

EDGES, ROUNDS, LOCAL_STEPS, RANK = (1, 4, 16), 6, 2, 8
GOAL_MILLISECONDS = 50.0


@dataclass(eq=False)
class Stopwatch:
    """A Trainer that notes how long another trains."""

    trainer: LocalTrainer
    seconds: list[float] = field(default_factory=list)

    def fit(self, state: TrainState, batches: Batches, plan: FitPlan, on_step: Callable[[StepReport], None]) -> Update:
        """The other's fit."""
        start = time.perf_counter()
        update = self.trainer.fit(state, batches, plan, on_step)
        self.seconds.append(time.perf_counter() - start)
        return update


def _examples(base_tokenizer: object) -> Examples:
    from atoll.config.schema import Data

    rows = load_rows("trainset.csv", base_dir=task.SHARED / "data" / "e2e", limit=64, on_bad_row="error")
    return tokenize(rows, text_form(Data(prompt="{mr} ->", completion=" {ref}"), rows.columns), base_tokenizer, 256)  # type: ignore[arg-type]


def measure(num_edges: int) -> dict[str, object]:
    """Milliseconds beyond training per edge and round, the first round left out, and where they go."""
    folder = str(task.SHARED / "models" / "stories260K")
    base, shapes = load_base(folder), read_shapes(folder)
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    start = fresh_adapters("lora", sizes, dict.fromkeys(sizes, RANK), 16.0, 0)
    names = {number + 1: f"edge{number:02}" for number in range(num_edges)}
    examples, watches, works = _examples(base.tokenizer), {}, {}
    for name in names.values():
        watches[name] = Stopwatch(LocalTrainer(base, Train(), ROUNDS * LOCAL_STEPS, dropout=0.0, seed=0, edge=name))
        works[name] = EdgeWork(
            name=name, trainer=watches[name], batches=BatchStream(examples, 4, 0, name, "bucket", pad_id(base.tokenizer)),
            num_examples=len(examples), plan=FitPlan(LOCAL_STEPS, 1, False), keep_optimizer=True,
            work_of=lambda report: Work(), on_step=lambda number, report: None,
        )  # fmt: skip
    rounds, parts = _run(start, names, works)
    overheads = []
    for number, seconds in enumerate(rounds):
        training = sum(statistics.seconds[number] for statistics in watches.values())
        overheads.append(1e3 * (seconds - training) / num_edges)
    by_part = {part: 1e3 * seconds / (num_edges * (ROUNDS - 1)) for part, seconds in parts.seconds.items()}
    by_part["the rest"] = statistics.mean(overheads[1:]) - sum(by_part.values())
    return {
        "median_milliseconds_per_edge": statistics.median(overheads[1:]), "milliseconds_per_edge_and_round": overheads[1:],
        "first_round_milliseconds_per_edge": overheads[0], "mean_milliseconds_per_edge_by_part": by_part,
        "training_milliseconds_per_edge": 1e3 * statistics.median(s for statistics in watches.values() for s in statistics.seconds[1:]),
        "adapter_bytes": start.num_bytes,
    }  # fmt: skip


def _run(start: AdapterState, names: dict[int, str], works: dict[str, EdgeWork]) -> tuple[list[float], Parts]:
    """Seconds of every round, from its start to the next one's, and where they went after the first."""
    starts: list[float] = []
    parts = Parts()

    def round_started(number: int) -> None:
        starts.append(time.perf_counter())
        if number == 2:
            parts.seconds.clear()

    def edge_dropped(number: int, edge: str, reason: str) -> None:
        raise SystemExit(reason)

    observer = Observer(round_started, lambda number, result: None, edge_dropped, lambda result: None)
    ranks = dict.fromkeys(names.values(), start.ranks)
    coordinator = AdapterStrategy(initial=start, edge_ranks=ranks, nodes=names, min_edges=len(names), observer=observer)
    states = EdgeStates(names)
    grid = InProcessGrid(client_app(lambda context: works[str(context.node_config["edge"])]), states)
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in TIMED]
    for owner, name, part in TIMED:
        parts.time(owner, name, part)
    try:
        coordinator.start(grid, coordinator.arrays(), ROUNDS, 3600.0, ConfigRecord({}))
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        states.close()
    ends = [*starts[1:], time.perf_counter()]
    return [end - begin for begin, end in zip(starts, ends, strict=True)], parts


TIMED = [
    (strategy, "aggregate", "aggregation (updates read from disk, QR and SVD in fp64)"), (Spool, "put", "updates to disk"),
    (strategy, "check_update", "checks of the update"),
    (strategy, "put_adapter", "adapter to message"), (strategy, "get_adapter", "message to adapter"),
    (strategy, "num_bytes", "counting bytes"), (EdgeParts, "of", "the edge's part of the adapter"),
    (client, "put_adapter", "adapter to message"), (client, "get_adapter", "message to adapter"),
    (client, "put_optimizer", "Adam moments kept"), (client, "get_optimizer", "Adam moments kept"),
    (store, "read_record", "edges' states on disk"), (store, "write_record", "edges' states on disk"),
    (PeakMemory, "__enter__", "memory meter"), (PeakMemory, "__exit__", "memory meter"),
]  # fmt: skip


def main() -> None:
    """Measure, print and keep."""
    if not (task.SHARED / "models").is_dir():
        raise SystemExit("needs the models and data in ../shared beside the project's folder")
    torch.set_num_threads(2)
    found = {}
    for num_edges in EDGES:
        found[f"{num_edges} edges"] = result = measure(num_edges)
        median = result["median_milliseconds_per_edge"]
        print(f"{num_edges} edges: {median:.1f} ms per edge and round beyond training (goal {GOAL_MILLISECONDS:.0f})")
        by_part: dict[str, float] = result["mean_milliseconds_per_edge_by_part"]  # type: ignore[assignment]
        print("  " + ", ".join(f"{part} {ms:.2f}" for part, ms in sorted(by_part.items(), key=lambda item: -item[1])))
    config = {"edges": EDGES, "rounds": ROUNDS, "local_steps": LOCAL_STEPS, "rank": RANK, "targets": "all-linear",
              "model": "stories260K", "threads": 2, "goal_milliseconds": GOAL_MILLISECONDS}  # fmt: skip
    results.write("round_overhead", config, found)


if __name__ == "__main__":
    main()
