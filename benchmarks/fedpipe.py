"""Methods of federated fine-tuning side by side on two fleets of five edges: quality, simulated time, bytes, memory.

Every run is `atoll.train` in a process of its own; training is real, time is by the edges' declared speeds and links. The learning rate is
constant, and the common adapter is scored after every round, so that one run is a curve of loss over time. Learning rates and the number
of rounds are looked for in the same way by every method and for every fleet, on dev rows and with a seed of its own; what is reported
comes from test rows and other seeds. A run that benchmarks/results/fedpipe.json or a line in WORK/results.jsonl has is not done again.

Usage: python benchmarks/fedpipe.py [run | table | all] [--tasks e2e 20news] [--fleets heterogeneous homogeneous] [--seeds 0 1 2] ...
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch

import json
import math
import shutil
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from atoll.config.load import config_hash, load
from atoll.errors import AtollError
from atoll.runs.events import Evaluated, Event, ImportanceFound, RoundFinished
from sides import fedpipe_table, needs
from sides.fleets import ABLATIONS, FEDPIPE, FLEETS, METHODS, Method, fleet_toml
from sides.kr_tasks import MODEL, TASKS, Sizes, prepare
from sides.options import Options
from sides.pool import fresh_processes

TUNING_SEED = 100
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
FIRST_RATES = slice(1, 3)
"""Two are tried, and then the next on the side of the better one, until it is worse."""
ABLATED_FLEET = "heterogeneous"
ROWS = 2
FILES = {"dev": "dev", "test": "test-spread"}
EVAL_ROWS = {"e2e": 100, "20news": 200}
OF_EDGES = ("name", "bits", "batch_size", "steps", "num_trainable", "predicted_peak_bytes", "under_training")


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
        asked = (f"run.rounds={self.rounds}", f"data.eval=data/{self.task}-{FILES[self.part]}.jsonl")
        return [*self.overrides, *asked, f"train.learning_rate={self.learning_rate}", f"run.seed={self.seed}"]

    def config(self, work: Path) -> Path:
        """The run.toml it starts from."""
        return work / f"{self.task}-{self.fleet}.toml"

    def key(self, work: Path) -> str:
        """Equal for specs that ask for the same run."""
        return _key(self, work)


@cache
def _key(spec: Spec, work: Path) -> str:
    config = load(spec.config(work), spec.all_overrides).config
    # Not by where the model lies, so that results that are kept count on another machine.
    return config_hash(config.model_copy(update={"model": config.model.model_copy(update={"base": MODEL})}))[:20]


class Curve:
    """The scores after every round, beside the simulated seconds and the bytes of adapters that had gone by."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self._seconds, self._bytes = 0.0, 0

    def __call__(self, event: Event) -> None:
        """Watch a run."""
        if isinstance(event, ImportanceFound) or (isinstance(event, RoundFinished) and event.phase == "federated"):
            self._seconds += event.simulated_seconds or 0.0
        if isinstance(event, RoundFinished) and event.phase == "federated":
            self._bytes += event.up_bytes + event.down_bytes
        elif isinstance(event, Evaluated) and event.row != "base":
            self.points.append({"seconds": self._seconds, "bytes": self._bytes, **event.metrics})


def perform(spec: Spec, work: Path, key: str) -> dict[str, Any]:
    """Train, and return what the results file keeps; its curve is empty where the method cannot run on the fleet."""
    from atoll.commands.train import train

    started, out = time.monotonic(), work / "runs" / key
    shutil.rmtree(out, ignore_errors=True)
    record: dict[str, Any] = {"key": key} | asdict(spec)
    curve = Curve()
    try:
        result = train(spec.config(work), out=out, overrides=spec.all_overrides, observers=[curve])
    except AtollError as error:
        return record | {"failed": error.page(), "curve": [], "wall_seconds": time.monotonic() - started}
    summary = json.loads(json.dumps(result.summary.to_json()))
    shutil.rmtree(out)
    return record | {
        "curve": curve.points, "traffic": summary["traffic"], "edges": [_of_edge(edge) for edge in summary["edges"]],
        "left_out": summary["left_out"], "edge_compute": summary["edge_compute"], "wall_seconds": time.monotonic() - started,
    }  # fmt: skip


def _of_edge(edge: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables say of an edge; its ranks by how many weights have them."""
    ranks = {str(rank): number for rank, number in sorted(Counter(edge["ranks"].values()).items())}
    return {name: edge[name] for name in OF_EDGES} | {"ranks": ranks}


class Results:
    """The runs that finished: those that the result file keeps, and results.jsonl in the work folder, a line for each."""

    def __init__(self, work: Path, kept: Iterable[dict[str, Any]] = ()) -> None:
        self._path = work / "results.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self.records: dict[str, dict[str, Any]] = {record["key"]: record for record in (*kept, *map(json.loads, lines))}

    def add(self, record: dict[str, Any]) -> None:
        """Append one line."""
        self.records[record["key"]] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def perform_all(wanted: Callable[[], Iterable[Spec]], work: Path, results: Results, jobs: int, deadline: float) -> None:
    """Run what is wanted and not finished, each in a process of its own; what is wanted may depend on results."""
    with fresh_processes(jobs) as pool:
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
            said = record.get("failed", "").splitlines()[:1] or [" ".join(f"{p['loss']:.3f}@{p['seconds']:.1f}" for p in record["curve"])]
            asked = f"{spec.task} {spec.fleet} {spec.method} lr {spec.learning_rate:g} seed {spec.seed} {spec.part}"
            print(f"{asked}: {said[0]}", flush=True)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a method does on test rows, found on dev rows."""

    rate: float
    rounds: int
    """After so many with this rate the loss was least, as a mean of three rounds."""
    rate_for_time: float
    """With this one LoRA's least mean of three was reached first; where no rate got there, that of the least loss."""


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
    rates: Sequence[float]
    rounds: int
    ablation_rounds: int

    def wanted(self) -> Iterator[Spec]:
        """All runs whose settings are known, one task and fleet after the other."""
        for task, fleet in self.pairs:
            # All targets are LoRA's.
            for method in dict.fromkeys((METHODS[0], *self._of(fleet))):
                yield from (self._tried(task, fleet, method, rate) for rate in self._curves(task, fleet, method))
            for seed in self.seeds:
                for method in self._of(fleet):
                    yield from self._compared(task, fleet, method, seed)
        for task, fleet in self.pairs:
            for seed in self.seeds[:1] if fleet == ABLATED_FLEET else ():
                yield from self._ablated(task, fleet, seed)

    def compared(self) -> list[dict[str, Any]]:
        """The results of those methods that are through with a seed, of those seeds with which all these are; each with what was chosen."""
        found: list[dict[str, Any]] = []
        for pair in self.pairs:
            by_seed = [{method.name: self._through(*pair, method, seed) for method in self._of(pair[1])} for seed in self.seeds]
            known = {name for methods in by_seed for name, records in methods.items() if records}
            complete = [methods for methods in by_seed if all(methods[name] for name in known)]
            found += [record for methods in complete for records in methods.values() for record in records]
        return found

    def _through(self, task: str, fleet: str, method: Method, seed: int) -> list[dict[str, Any]]:
        """All results of a method with this seed, or none."""
        choice = self._choice(task, fleet, method)
        records = [self._found(spec) for spec in self._compared(task, fleet, method, seed)]
        if choice is None or None in records:
            return []
        return [{**record, "chosen": asdict(choice)} for record in records if record is not None]

    def ablated(self) -> list[dict[str, Any]]:
        """The results without one part, where all are there."""
        pairs = [(task, fleet) for task, fleet in self.pairs if fleet == ABLATED_FLEET and self.seeds]
        groups = [[self._found(spec) for spec in self._ablated(*pair, self.seeds[0])] for pair in pairs]
        return [record for group in groups if None not in group for record in group if record is not None]

    def tuned(self) -> list[dict[str, Any]]:
        """The dev curves that were looked at, without what they cost."""
        tried = [(*pair, method) for pair in self.pairs for method in self._of(pair[1])]
        records = [self._found(self._tried(*one, rate)) for one in tried for rate in self._curves(*one)]
        kept = ("key", "task", "fleet", "method", "learning_rate", "seed", "curve")
        return [{name: record[name] for name in kept} for record in records if record is not None]

    def _of(self, fleet: str) -> list[Method]:
        """What can be told apart there."""
        return [method for method in self.methods if fleet != "homogeneous" or not method.is_lora_on_equals]

    def _spec(self, task: str, fleet: str, method: Method, rate: float, seed: int, part: str, rounds: int | None = None) -> Spec:
        return Spec(task, fleet, method.name, tuple(method.all_overrides(fleet)), rate, seed, part, rounds or self.rounds)

    def _found(self, spec: Spec) -> dict[str, Any] | None:
        return self.results.records.get(spec.key(self.work))

    def _tried(self, task: str, fleet: str, method: Method, rate: float) -> Spec:
        return self._spec(task, fleet, method, rate, TUNING_SEED, "dev")

    def _curves(self, task: str, fleet: str, method: Method) -> dict[float, Sequence[Mapping[str, float]] | None]:
        """By learning rate, as far as it is known which ones; None where the run is missing.

        Where the best is at an end of what was tried, the next is to be tried too.
        """
        curves: dict[float, Sequence[Mapping[str, float]] | None] = {}
        asked = list(self.rates[FIRST_RATES] or self.rates)
        while asked:
            for rate in asked:
                record = self._found(self._tried(task, fleet, method, rate))
                curves[rate] = None if record is None else record["curve"]
            if None in curves.values() or not any(curves.values()):
                break
            best = self.rates.index(min(curves, key=lambda rate: _least(curves[rate])))
            asked = [rate for rate in self.rates[max(0, best - 1) : best + 2] if rate not in curves]
        return curves

    def _choice(self, task: str, fleet: str, method: Method) -> Choice | None:
        """None while a run is missing."""
        target = self._dev_target(task, fleet)
        curves = self._curves(task, fleet, method)
        if target is None or None in curves.values():
            return None
        rate = min(curves, key=lambda rate: _least(curves[rate]))
        losses = fedpipe_table.settled(curves[rate] or ())
        numbers = {rate: fedpipe_table.reached(curve or (), target) for rate, curve in curves.items()}
        in_time = {rate: number for rate, number in numbers.items() if number is not None}
        # Rounds of another rate are as long, but for milliseconds where a warm-up led to another plan.
        quickest = min(in_time, key=lambda rate: (in_time[rate], _least(curves[rate])), default=rate)
        return Choice(rate, 1 + losses.index(min(losses)) if losses else 0, quickest)

    def _dev_target(self, task: str, fleet: str) -> float | None:
        """The least mean of three rounds of plain LoRA; None while a run is missing."""
        curves = self._curves(task, fleet, METHODS[0])
        return None if None in curves.values() else min(map(_least, curves.values()))

    def _compared(self, task: str, fleet: str, method: Method, seed: int) -> Iterator[Spec]:
        choice = self._choice(task, fleet, method)
        if choice is not None:
            yield from (self._spec(task, fleet, method, rate, seed, "test") for rate in dict.fromkeys((choice.rate, choice.rate_for_time)))

    def _ablated(self, task: str, fleet: str, seed: int) -> Iterator[Spec]:
        """FedPipe and FedPipe without one of its parts, equally long, at FedPipe's learning rate."""
        fedpipe = next((method for method in self.methods if method.name == FEDPIPE), None)
        choice = None if fedpipe is None else self._choice(task, fleet, fedpipe)
        if fedpipe is not None and choice is not None and self.ablations:
            yield self._spec(task, fleet, fedpipe, choice.rate, seed, "test")
            for method in self.ablations:
                yield self._spec(task, fleet, method, choice.rate, seed, "test", self.ablation_rounds)


def _least(curve: Sequence[Mapping[str, float]] | None) -> float:
    return min((loss for loss in fedpipe_table.settled(curve or ()) if math.isfinite(loss)), default=math.inf)


def write_configs(work: Path, eval_rows: Mapping[str, int], local_steps: int) -> None:
    """TASK-FLEET.toml beside the rows and the fleets."""
    prepare(work, list(eval_rows), Sizes(), anew=False)
    for name in eval_rows:
        _spread(work / "data" / f"{name}-test.jsonl", work / "data" / f"{name}-{FILES['test']}.jsonl")
    for fleet in FLEETS:
        (work / f"{fleet}.toml").write_text(fleet_toml(fleet), encoding="utf-8")
        for name, count in eval_rows.items():
            (work / f"{name}-{fleet}.toml").write_text(_toml(name, fleet, count, local_steps), encoding="utf-8")


def _spread(source: Path, to: Path) -> None:
    """The same rows, first one of every input: E2E has many references for each, which would be the first hundred rows."""
    lines, seen, ordered = source.read_text(encoding="utf-8").splitlines(keepends=True), Counter[str](), list[tuple[int, str]]()
    for line in lines:
        given = next(iter(json.loads(line).values()))
        ordered.append((seen[given], line))
        seen[given] += 1
    to.write_text("".join(line for _, line in sorted(ordered, key=lambda one: one[0])), encoding="utf-8")


def _toml(name: str, fleet: str, eval_rows: int, local_steps: int) -> str:
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
base = "{needs.shared("models", MODEL)}"
{kind}

[data]
train = "data/{name}-train.jsonl"
eval = "data/{name}-dev.jsonl"
{rows}
max_length = {longest}
train_rows = 2000
eval_rows = {eval_rows}
partition = "{partition}"

[adapter]
targets = "all-linear"
rank = 8
alpha = 16

[plan]
infeasible = "leave-out"

[train]
batch_size = {ROWS}
local_steps = {local_steps}
schedule = "constant"

[evaluate]
every = 1
"""


def main() -> None:
    """Tune, run, and write the tables."""
    given = _arguments()
    needs.package("bitsandbytes")
    given.work.mkdir(parents=True, exist_ok=True)
    eval_rows = {task: min(EVAL_ROWS[task], given.eval_rows) for task in given.tasks}
    write_configs(given.work, eval_rows, given.local_steps)

    def asked(methods: Sequence[Method]) -> tuple[Method, ...]:
        return tuple(one for one in methods if one.name in given.methods)

    kept = (record for record in fedpipe_table.kept(given.out) if record["method"] not in given.anew)
    results = Results(given.work, kept)
    pairs = tuple((task, fleet) for fleet in given.fleets for task in given.tasks)
    bench = Bench(
        given.work, results, tuple(given.seeds), pairs, asked(METHODS), asked(ABLATIONS), given.rates, given.rounds, given.ablation_rounds
    )  # fmt: skip
    if given.what in ("run", "all"):
        perform_all(bench.wanted, given.work, results, given.jobs, time.monotonic() + 60 * given.minutes)
    if given.what in ("table", "all"):
        fedpipe_table.write(given.out, bench.compared(), bench.ablated(), bench.tuned(), {
            "model": MODEL, "rounds": given.rounds, "ablation_rounds": given.ablation_rounds, "local_steps": given.local_steps,
            "rows": ROWS, "eval_rows": eval_rows, "rates": given.rates, "seeds": given.seeds, "tuning_seed": TUNING_SEED,
        })  # fmt: skip


def _arguments() -> Namespace:
    options = Options(__doc__, work="fedpipe")
    options.add_argument("what", nargs="?", choices=("run", "table", "all"), default="all")
    options.size("--tasks", ["e2e", "20news"], ["e2e"], choices=("e2e", "20news"))
    options.size("--fleets", list(FLEETS), [ABLATED_FLEET], choices=tuple(FLEETS))
    options.size("--methods", [method.name for method in (*METHODS, *ABLATIONS)], [FEDPIPE])
    options.add_argument("--anew", nargs="+", default=[], help="methods whose runs among the results do not count, by name")
    options.size("--seeds", [0, 1, 2], [0])
    options.size("--rates", list(RATES), [RATES[-1]])
    options.size("--rounds", 10, 3)
    options.size("--ablation-rounds", 5, 3)
    options.size("--local-steps", 8, 1)
    options.size("--eval-rows", max(EVAL_ROWS.values()), 2, help="at most")
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--minutes", type=float, default=1e6, help="start nothing new after so long")
    return options.parse()


if __name__ == "__main__":
    main()
