"""Methods of federated fine-tuning side by side on two fleets of five edges: quality, simulated time, bytes, memory.

Every run is `atoll.train` in a process of its own; training is real, time is by the edges' declared speeds and links. Learning rates are
chosen from one grid for every method, on dev rows with a seed of its own; what is reported comes from test rows and other seeds. A
finished run is a line in WORK/results.jsonl and is not done again.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from atoll.commands.train import train
from atoll.config.load import config_hash, load
from atoll.errors import AtollError
from atoll.runs.events import Event
from sides import fedpipe_table
from sides.fleets import ABLATIONS, FLEETS, METHODS, Method, fleet_toml
from sides.kr_tasks import MODEL, SHARED, TASKS, Sizes, prepare

TUNING_SEED = 100
TUNING_ROUNDS = 5
LENGTHS = (4, 10)
"""Rounds. With a learning rate that falls to zero, the way to be at a target sooner is a shorter run: every method may choose."""
LOCAL_STEPS, ROWS, EVAL_ROWS = 8, 4, 100


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
        return config_hash(load(self.config(work), self.all_overrides).config)[:20]


def perform(spec: Spec, work: Path, key: str) -> dict[str, Any]:
    """Train, and return what the results file keeps."""
    started, out, seen = time.monotonic(), work / "runs" / key, list[Event]()
    shutil.rmtree(out, ignore_errors=True)
    record: dict[str, Any] = {"key": key} | asdict(spec)
    try:
        result = train(spec.config(work), out=out, overrides=spec.all_overrides, observers=[seen.append])
    except AtollError as error:
        return record | {"failed": error.page(), "losses": [], "wall_seconds": time.monotonic() - started}
    summary = json.loads(json.dumps(result.summary.to_json()))
    shutil.rmtree(out)
    return record | {
        "losses": list(_curve(seen)), "scores": summary["eval"]["adapted"], "traffic": summary["traffic"], "edges": summary["edges"],
        "left_out": summary["left_out"], "edge_compute": summary["edge_compute"], "simulated_seconds": summary["seconds"]["simulated"],
        "versions": summary["versions"], "wall_seconds": time.monotonic() - started,
    }  # fmt: skip


def _curve(seen: Sequence[Event]) -> Iterator[tuple[float, float]]:
    """Simulated seconds and loss on held-out rows after every round; what a warm-up took is in the first one."""
    seconds = 0.0
    for event in seen:
        name = event.kind()
        if name == "importance_found":
            seconds += event.simulated_seconds or 0.0  # type: ignore[attr-defined]
        elif name == "round_finished" and event.phase == "federated":  # type: ignore[attr-defined]
            seconds += event.simulated_seconds  # type: ignore[attr-defined]
        elif name == "evaluated" and (event.row.startswith("round-") or event.row == "federated"):  # type: ignore[attr-defined]
            yield seconds, event.metrics["loss"]  # type: ignore[attr-defined]


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


def perform_all(specs: Sequence[Spec], work: Path, results: Results, jobs: int, deadline: float) -> None:
    """Run what is not finished, each in a process of its own; after the deadline nothing new starts."""
    waiting = {spec.key(work): spec for spec in specs}
    waiting = {key: spec for key, spec in waiting.items() if key not in results.records}
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running = {}
        while running or waiting:
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                key, spec = next(iter(waiting.items()))
                del waiting[key]
                running[pool.submit(perform, spec, work, key)] = spec
            if not running:
                break
            future = next(as_completed(running))
            spec, record = running.pop(future), future.result()
            results.add(record)
            said = record.get("failed", "").splitlines()[:1] or [f"{record['losses'][-1][1]:.4f} after {record['simulated_seconds']:.1f} s"]
            rest = f"{len(waiting) + len(running)} to go"
            print(f"{spec.task} {spec.fleet} {spec.method} lr {spec.learning_rate:g} seed {spec.seed}: {said[0]} ({rest})", flush=True)


def tuning(method: Method, task: str, fleet: str, rates: Sequence[float]) -> list[Spec]:
    """One short run on dev rows for every learning rate."""
    return [Spec(task, fleet, method.name, tuple(method.all_overrides(fleet)), rate, TUNING_SEED, "dev", TUNING_ROUNDS) for rate in rates]


def best_rate(specs: Sequence[Spec], work: Path, results: Results) -> float | None:
    """The rate with the least loss; None while a run is missing. Of one rate, nothing is to be chosen."""
    if len(specs) == 1:
        return specs[0].learning_rate
    found = [results.records.get(spec.key(work)) for spec in specs]
    if None in found:
        return None
    losses = [record["losses"][-1][1] if record["losses"] else math.inf for record in found]  # type: ignore[index]
    return specs[min(range(len(specs)), key=lambda number: losses[number])].learning_rate


def write_configs(work: Path, tasks: Sequence[str]) -> None:
    """TASK-FLEET.toml beside the rows and the fleets."""
    prepare(work, tasks, Sizes(), anew=False)
    for fleet in FLEETS:
        (work / f"{fleet}.toml").write_text(fleet_toml(fleet), encoding="utf-8")
        for task in (TASKS[name] for name in tasks):
            (work / f"{task.name}-{fleet}.toml").write_text(_toml(task.name, fleet), encoding="utf-8")


def _toml(name: str, fleet: str) -> str:
    task = TASKS[name]
    partition = "dirichlet:0.5:label" if name == "20news" else "iid"
    return f"""# {task.title} on the {fleet} fleet of five
[run]
name = "{name}-{fleet}"
fleet = "{fleet}.toml"

[model]
base = "{SHARED / "models" / MODEL}"
cut = {{ front = 0, back = 0 }}

[data]
train = "data/{name}-train.jsonl"
eval = "data/{name}-dev.jsonl"
prompt = "{task.prompt}"
completion = "{task.completion}"
max_length = 96
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

[evaluate]
every = 1
"""


def main() -> None:
    """Tune, run, and write the tables."""
    given = _arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    write_configs(given.work, given.tasks)
    methods = [one for one in (*METHODS, *ABLATIONS) if not given.methods or one.name in given.methods]
    results, deadline = Results(given.work), time.monotonic() + 60 * given.minutes
    pairs = [(task, fleet) for fleet in given.fleets for task in given.tasks]
    if given.what in ("run", "all"):
        specs = [spec for task, fleet in pairs for method in methods for spec in tuning(method, task, fleet, given.rates)]
        perform_all(specs if len(given.rates) > 1 else [], given.work, results, given.jobs, deadline)
        perform_all(list(_reporting(pairs, methods, given, results)), given.work, results, given.jobs, deadline)
    if given.what in ("table", "all"):
        keys = {spec.key(given.work) for spec in _reporting(pairs, methods, given, results)}
        fedpipe_table.write([record for key, record in results.records.items() if key in keys], {
            "model": MODEL, "rounds": list(LENGTHS), "local_steps": LOCAL_STEPS, "rows": ROWS, "eval_rows": EVAL_ROWS, "rates": given.rates,
            "seeds": given.seeds, "tuning_seed": TUNING_SEED, "tuning_rounds": TUNING_ROUNDS,
        })  # fmt: skip


def _reporting(pairs: Sequence[tuple[str, str]], methods: Sequence[Method], given: argparse.Namespace, results: Results) -> Iterator[Spec]:
    for seed in given.seeds:
        for task, fleet in pairs:
            for method in methods:
                specs = tuning(method, task, fleet, given.rates)
                rate = best_rate(specs, given.work, results)
                if rate is not None:
                    yield from (Spec(task, fleet, method.name, specs[0].overrides, rate, seed, "test", rounds) for rounds in LENGTHS)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "table", "all"), default="all")
    parser.add_argument("--work", type=Path, default=Path(__file__).resolve().parents[1] / "build" / "fedpipe", help="runs and results")
    parser.add_argument("--tasks", nargs="+", choices=("e2e", "20news"), default=["e2e", "20news"])
    parser.add_argument("--fleets", nargs="+", choices=tuple(FLEETS), default=list(FLEETS))
    parser.add_argument("--methods", nargs="+", default=[], help="only these, by name")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 1e-2])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing new after so long")
    return parser.parse_args()


if __name__ == "__main__":
    main()
