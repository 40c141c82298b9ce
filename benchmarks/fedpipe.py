"""Methods of federated fine-tuning side by side on two fleets of five edges: quality, simulated time, bytes, memory.

Every run is `atoll.train` in a process of its own; training is real, time is by the edges' declared speeds and links. Learning rates are
looked for in the same way for every method, on dev rows of the heterogeneous fleet with a seed of its own; what is reported comes from
test rows and other seeds. A finished run is a line in WORK/results.jsonl and is not done again.

Usage: python benchmarks/fedpipe.py [run | table | all] [--tasks e2e 20news] [--fleets heterogeneous homogeneous] [--seeds 0 1 2] ...
"""

from __future__ import annotations

import argparse
import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from atoll.commands.train import train
from atoll.config.load import config_hash, load
from atoll.errors import AtollError
from sides import fedpipe_table
from sides.fleets import ABLATIONS, FEDPIPE, FLEETS, METHODS, Method, fleet_toml
from sides.kr_tasks import MODEL, SHARED, TASKS, Sizes, prepare

TUNING_SEED = 100
TUNING_ROUNDS = 5
TUNING_FLEET = "heterogeneous"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 4e-2)
FIRST_RATES = (3e-3, 1e-2)
"""Two are tried, and then the next on the side of the better one, until it is worse."""
LENGTHS = (3, 4, 8, 10)
"""Rounds. With a learning rate that falls to zero, the way to be at a target sooner is a shorter run: every method has its shortest looked
for, by halving."""
ABLATION_ROUNDS = 4
LOCAL_STEPS, ROWS, EVAL_ROWS = 8, 2, 100


@dataclass(frozen=True, slots=True)
class Spec:
    """One run."""

    task: str
    fleet: str
    method: str
    overrides: tuple[str, ...]
    learning_rate: float
    seed: int
    part: str
    """"dev" or "test": the rows that are scored."""
    rounds: int

    @property
    def all_overrides(self) -> list[str]:
        """Everything that is put on top of the task's run.toml."""
        asked = (f"run.rounds={self.rounds}", f"data.eval=data/{self.task}-{self.part}.jsonl")
        return [*self.overrides, *asked, f"train.learning_rate={self.learning_rate}", f"run.seed={self.seed}"]

    def config(self, work: Path) -> Path:
        """The run.toml it starts from."""
        return work / f"{self.task}-{self.fleet}.toml"

    def key(self, work: Path) -> str:
        """Equal for specs that ask for the same run."""
        return _key(self, work)


@cache
def _key(spec: Spec, work: Path) -> str:
    return config_hash(load(spec.config(work), spec.all_overrides).config)[:20]


def perform(spec: Spec, work: Path, key: str) -> dict[str, Any]:
    """Train, and return what the results file keeps; "loss" is None where the method cannot run on the fleet."""
    started, out = time.monotonic(), work / "runs" / key
    shutil.rmtree(out, ignore_errors=True)
    record: dict[str, Any] = {"key": key} | asdict(spec)
    try:
        result = train(spec.config(work), out=out, overrides=spec.all_overrides)
    except AtollError as error:
        return record | {"failed": error.page(), "loss": None, "wall_seconds": time.monotonic() - started}
    summary = json.loads(json.dumps(result.summary.to_json()))
    shutil.rmtree(out)
    scores = summary["eval"]["adapted"]
    return record | {
        "loss": scores["loss"], "scores": scores, "traffic": summary["traffic"], "edges": summary["edges"],
        "left_out": summary["left_out"], "edge_compute": summary["edge_compute"], "simulated_seconds": summary["seconds"]["simulated"],
        "versions": summary["versions"], "wall_seconds": time.monotonic() - started,
    }  # fmt: skip


class Results:
    """results.jsonl in the work folder: one line for every run that finished."""

    def __init__(self, work: Path) -> None:
        self._path = work / "results.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self.records: dict[str, dict[str, Any]] = {record["key"]: record for record in map(json.loads, lines)}

    def add(self, record: dict[str, Any]) -> None:
        """Append one line."""
        self.records[record["key"]] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def perform_all(wanted: Callable[[], Iterable[Spec]], work: Path, results: Results, jobs: int, deadline: float) -> None:
    """Run what is wanted and not finished, each in a process of its own; what is wanted may depend on results."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running: dict[Future[dict[str, Any]], Spec] = {}
        while True:
            waiting = [spec for spec in dict.fromkeys(wanted()) if spec.key(work) not in results.records]
            waiting = [spec for spec in waiting if spec not in running.values()]
            if time.monotonic() < deadline:
                for spec in waiting[: jobs - len(running)]:
                    running[pool.submit(perform, spec, work, spec.key(work))] = spec
            if not running:
                return
            future = next(as_completed(running))
            spec, record = running.pop(future), future.result()
            results.add(record)
            said = record.get("failed", "").splitlines()[:1] or [f"{record['loss']:.4f} after {record['simulated_seconds']:.1f} s"]
            asked = f"{spec.task} {spec.fleet} {spec.method} {spec.rounds} rounds lr {spec.learning_rate:g} seed {spec.seed} {spec.part}"
            print(f"{asked}: {said[0]}", flush=True)


@dataclass(frozen=True, slots=True)
class Bench:
    """Which runs belong to the comparison, as far as it is known by now."""

    work: Path
    results: Results
    seeds: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...]
    """Task and fleet."""
    methods: tuple[Method, ...]
    ablations: tuple[Method, ...]

    def wanted(self) -> Iterator[Spec]:
        """All runs whose settings are known."""
        for task, fleet in self.pairs:
            for method in self.methods:
                yield from self._tuning(task, method)
                yield from (self._tried(task, method, rate, LENGTHS[-1]) for rate in self._losses_of_longest(task, method))
            for seed in self.seeds:
                yield from self._compared(task, fleet, seed)
                if fleet == TUNING_FLEET and self.ablations:
                    yield from self._ablated(task, seed)

    def compared(self) -> list[dict[str, Any]]:
        """The results of the comparison, of those methods that are through with a seed, and of those seeds with which all these are."""
        groups = [[self._finished([list(self._lengths(*pair, method, seed)) for method in self.methods]) for seed in self.seeds]
                  for pair in self.pairs]  # fmt: skip
        known = [[{record["method"] for record in records} for records in pair] for pair in groups]
        return [
            record for pair, methods in zip(groups, known, strict=True) for records, found in zip(pair, methods, strict=True)
            if found == set().union(*methods) for record in records
        ]  # fmt: skip

    def ablated(self) -> list[dict[str, Any]]:
        """The results without one part, of those seeds with which all are through."""
        tasks = [task for task, fleet in self.pairs if fleet == TUNING_FLEET]
        return self._finished([list(self._ablated(task, seed)) for task in tasks for seed in self.seeds])

    def _finished(self, groups: Sequence[Sequence[Spec]]) -> list[dict[str, Any]]:
        found = [[self._found(spec) for spec in group] for group in groups]
        return [record for group in found if None not in group for record in group if record is not None]

    def _compared(self, task: str, fleet: str, seed: int) -> Iterator[Spec]:
        for method in self.methods:
            yield from self._lengths(task, fleet, method, seed)

    def _ablated(self, task: str, seed: int) -> Iterator[Spec]:
        """FedPipe and FedPipe without one of its parts, equally long, at FedPipe's learning rate."""
        fedpipe = next((method for method in self.methods if method.name == FEDPIPE), None)
        rate = None if fedpipe is None else self._rate(task, fedpipe)
        if fedpipe is not None and rate is not None:
            for method in (fedpipe, *self.ablations):
                yield self._spec(task, TUNING_FLEET, method, rate, seed, ABLATION_ROUNDS)

    def _spec(self, task: str, fleet: str, method: Method, rate: float, seed: int, rounds: int, part: str = "test") -> Spec:
        return Spec(task, fleet, method.name, tuple(method.all_overrides(fleet)), rate, seed, part, rounds)

    def _found(self, spec: Spec) -> dict[str, Any] | None:
        return self.results.records.get(spec.key(self.work))

    def _tuning(self, task: str, method: Method) -> list[Spec]:
        """Short runs on dev rows, as far as it is known which ones."""
        return [self._tried(task, method, rate) for rate in self._losses(task, method)]

    def _tried(self, task: str, method: Method, rate: float, rounds: int = TUNING_ROUNDS) -> Spec:
        return self._spec(task, TUNING_FLEET, method, rate, TUNING_SEED, rounds, "dev")

    def _loss(self, spec: Spec) -> float | None:
        """None while the run is missing, infinite where it failed."""
        record = self._found(spec)
        return None if record is None else math.inf if record["loss"] is None else record["loss"]

    def _losses(self, task: str, method: Method) -> dict[float, float | None]:
        """By learning rate; None where the run is missing. Where the best is at an end of what was tried, the next is to be tried too."""
        losses: dict[float, float | None] = {}
        asked = list(FIRST_RATES)
        while asked:
            for rate in asked:
                losses[rate] = self._loss(self._tried(task, method, rate))
            if None in losses.values():
                break
            best = RATES.index(_least(losses))
            asked = [rate for rate in RATES[max(0, best - 1) : best + 2] if rate not in losses]
        return losses

    def _rate(self, task: str, method: Method) -> float | None:
        """The rate with the least loss; None while a run is missing."""
        losses = self._losses(task, method)
        return None if None in losses.values() else _least(losses)

    def _losses_of_longest(self, task: str, method: Method) -> dict[float, float | None]:
        """By learning rate, of the longest run on dev rows: at that of short runs and the next lower one."""
        rate = self._rate(task, method)
        if rate is None or self._loss(self._tried(task, method, rate)) == math.inf:
            return {}
        lower = RATES[max(0, RATES.index(rate) - 1)]
        return {one: self._loss(self._tried(task, method, one, LENGTHS[-1])) for one in (rate, lower)}

    def _rate_of_longest(self, task: str, method: Method) -> float | None:
        """As `_rate`; that of short runs, where the method cannot run."""
        losses = self._losses_of_longest(task, method)
        return None if None in losses.values() else _least(losses) if losses else self._rate(task, method)

    def _lengths(self, task: str, fleet: str, method: Method, seed: int) -> Iterator[Spec]:
        """The longest run, and those by which the shortest is found that ends at the target."""
        rate, of_longest = self._rate(task, method), self._rate_of_longest(task, method)
        if rate is None or of_longest is None:
            return
        runs = {rounds: self._spec(task, fleet, method, rate, seed, rounds) for rounds in LENGTHS[:-1]}
        runs[LENGTHS[-1]] = self._spec(task, fleet, method, of_longest, seed, LENGTHS[-1])
        yield runs[LENGTHS[-1]]
        target = self._target(task, fleet, seed)
        found = {rounds: self._found(spec) for rounds, spec in runs.items()}
        losses = {rounds: record["loss"] for rounds, record in found.items() if record is not None}
        if target is not None and LENGTHS[-1] in losses:
            yield from (runs[rounds] for rounds in probed({rounds: loss is not None and loss <= target for rounds, loss in losses.items()}))

    def _target(self, task: str, fleet: str, seed: int) -> float | None:
        """What the longest run of plain LoRA with this seed ends with."""
        lora = METHODS[0]
        rate = self._rate_of_longest(task, lora)
        record = None if rate is None else self._found(self._spec(task, fleet, lora, rate, seed, LENGTHS[-1]))
        return None if record is None else record["loss"]


def _least(losses: Mapping[float, float | None]) -> float:
    return min(losses, key=lambda rate: math.inf if losses[rate] is None else losses[rate])  # type: ignore[arg-type,return-value]


def probed(reached: Mapping[int, bool]) -> list[int]:
    """The lengths that a search by halving looks at after the longest, as far as it is known which of them reach the target.

    >>> probed({10: False}), probed({10: True}), probed({10: True, 4: False}), probed({10: True, 4: True, 3: False})
    ([], [4], [4, 8], [4, 3])
    """
    looked_at, low, high = list[int](), -1, len(LENGTHS) - 1
    while reached[LENGTHS[-1]] and high - low > 1:
        middle = (low + high) // 2
        looked_at.append(LENGTHS[middle])
        if LENGTHS[middle] not in reached:
            break
        low, high = (low, middle) if reached[LENGTHS[middle]] else (middle, high)
    return looked_at


def write_configs(work: Path, tasks: Sequence[str]) -> None:
    """TASK-FLEET.toml beside the rows and the fleets."""
    prepare(work, tasks, Sizes(), anew=False)
    for fleet in FLEETS:
        (work / f"{fleet}.toml").write_text(fleet_toml(fleet), encoding="utf-8")
        for task in (TASKS[name] for name in tasks):
            (work / f"{task.name}-{fleet}.toml").write_text(_toml(task.name, fleet), encoding="utf-8")


def _toml(name: str, fleet: str) -> str:
    task = TASKS[name]
    if name == "20news":  # The paper's classifier: here of the seven topics that its groups' names begin with.
        kind, partition, rows, longest = 'task = "classify"', "dirichlet:1:topic", 'text = "{text}"\nlabel = "topic"', 48
    else:
        kind, partition, rows, longest = "", "iid", f'prompt = "{task.prompt}"\ncompletion = "{task.completion}"', 96
    return f"""# {task.title} on the {fleet} fleet of five
[run]
name = "{name}-{fleet}"
fleet = "{fleet}.toml"

[model]
base = "{SHARED / "models" / MODEL}"
{kind}

[data]
train = "data/{name}-train.jsonl"
eval = "data/{name}-dev.jsonl"
{rows}
max_length = {longest}
train_rows = 2000
eval_rows = {EVAL_ROWS}
partition = "{partition}"

[adapter]
targets = "all-linear"
rank = 8
alpha = 16

[plan]
infeasible = "leave-out"

[train]
batch_size = {ROWS}
local_steps = {LOCAL_STEPS}
"""


def main() -> None:
    """Tune, run, and write the tables."""
    given = _arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    write_configs(given.work, given.tasks)

    def asked(methods: Sequence[Method]) -> tuple[Method, ...]:
        return tuple(one for one in methods if not given.methods or one.name in given.methods)

    results = Results(given.work)
    pairs = tuple((task, fleet) for fleet in given.fleets for task in given.tasks)
    bench = Bench(given.work, results, tuple(given.seeds), pairs, asked(METHODS), asked(ABLATIONS))
    if given.what in ("run", "all"):
        perform_all(bench.wanted, given.work, results, given.jobs, time.monotonic() + 60 * given.minutes)
    if given.what in ("table", "all"):
        fedpipe_table.write(bench.compared(), bench.ablated(), {
            "model": MODEL, "rounds": list(LENGTHS), "ablation_rounds": ABLATION_ROUNDS, "local_steps": LOCAL_STEPS, "rows": ROWS,
            "eval_rows": EVAL_ROWS, "rates": RATES, "seeds": given.seeds, "tuning_seed": TUNING_SEED, "tuning_rounds": TUNING_ROUNDS,
        })  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "table", "all"), default="all")
    parser.add_argument("--work", type=Path, default=Path(__file__).resolve().parents[1] / "build" / "fedpipe", help="runs and results")
    parser.add_argument("--tasks", nargs="+", choices=("e2e", "20news"), default=["e2e", "20news"])
    parser.add_argument("--fleets", nargs="+", choices=tuple(FLEETS), default=list(FLEETS))
    parser.add_argument("--methods", nargs="+", default=[], help="only these, by name")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing new after so long")
    return parser.parse_args()


if __name__ == "__main__":
    main()
