"""One run of the comparison of module choices: `atoll.train` in split mode and the scores of its adapter, as one JSON line."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import atoll
from atoll.commands.resume import resume
from atoll.commands.train import RunResult, train
from atoll.config.load import load
from atoll.config.schema import Evaluate
from atoll.errors import AtollError, InputError, PeerError, ResumeError, RunFolderError
from atoll.runs.events import read_events
from sides.kr_tasks import TASKS
from sides.pool import fresh_processes

BASE_SETTING = "base"
"""No training at all: the scores of the base."""
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Spec:
    """What to run. `setting` names the choice of modules in tables; `overrides` are section.key=value."""

    task: str
    setting: str
    overrides: tuple[str, ...]
    learning_rate: float
    seed: int
    part: str
    """"dev" or "test": the rows that are scored."""

    @property
    def all_overrides(self) -> list[str]:
        """Everything that is put on top of the task's run.toml."""
        return [*self.overrides, f"train.learning_rate={self.learning_rate}", f"run.seed={self.seed}"]

    def key(self, work: Path) -> str:
        """Equal for specs that ask for the same run and the same scores."""
        if self.setting == BASE_SETTING:
            return f"{self.task}-base-{self.part}"
        loaded = load(work / f"{self.task}.toml", self.all_overrides)
        # Neither by where the base lies nor by keys at their defaults: what is kept counts on other machines and in later versions.
        asked = loaded.config.model_dump(mode="json", exclude_defaults=True)
        asked["model"] = asked.get("model", {}) | {"base": Path(loaded.config.model.base).name}
        return f"{self.task}-{self.part}-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]}"


def perform(spec: Spec, work: Path, key: str) -> dict[str, Any]:
    """Train, or go on where a process that was stopped had come to; score, and return what the results file keeps."""
    config_path = work / f"{spec.task}.toml"
    record: dict[str, Any] = {"key": key} | asdict(spec) | {"source": source_digest()}
    if spec.setting == BASE_SETTING:
        started = time.monotonic()
        return record | {"scores": _scores(config_path, None, spec), "wall_seconds": time.monotonic() - started}
    out = work / "runs" / key
    try:
        result = _trained(config_path, out, spec)
    except PeerError as error:
        if spec.part != "dev":
            raise
        return record | {"scores": {"loss": math.inf}, "failed": error.page()}  # A learning rate at which training breaks is not chosen.
    trained = time.monotonic()
    events: list[Any] = list(read_events(out / "events.jsonl"))
    summary: Any = result.summary.to_json()
    # A round that was stopped and begun again has its steps twice, and they are the same.
    losses = list({event["step"]: event["loss"] for event in events if event["event"] == "step_done"}.values())
    config = load(config_path, spec.all_overrides).config
    curve = _curve(events, config.train.local_steps, config.run.rounds)
    (edge,) = result.summary.edges
    record |= {
        "select": config.select.model_dump(mode="json"), "steps": edge.steps,
        "num_modules": len(edge.ranks), "scores": curve[-1] if spec.part == "dev" and curve else _scores(config_path, result.adapter, spec),
        "traffic": summary["traffic"], "edge_compute": summary["edge_compute"], "active_share": edge.active_share,
        "choices": list(_choices(events)), "curve": curve, "times_resumed": sum(event["event"] == "resumed" for event in events),
        "train_loss": statistics.mean(losses[-len(losses) // 5 :]), "train_seconds": summary["seconds"]["wall"],
        "wall_seconds": summary["seconds"]["wall"] + time.monotonic() - trained, "versions": summary["versions"],
    }  # fmt: skip
    shutil.rmtree(out)
    return record


def _trained(config_path: Path, out: Path, spec: Spec) -> RunResult:
    if (out / "config.json").exists():
        try:
            return resume(out, trust=True)
        except (ResumeError, RunFolderError):
            pass  # Of other code or rows: it begins again.
    shutil.rmtree(out, ignore_errors=True)
    return train(config_path, out=out, overrides=spec.all_overrides)


def _curve(events: Sequence[Mapping[str, Any]], round_steps: int | None, rounds: int) -> list[dict[str, float]]:
    """The held-out loss after so many steps, from none on; what was due when a process was stopped may be missing."""
    numbers = {"base": 0, "federated": rounds} | {f"round-{number}": number for number in range(1, rounds)}
    found = {numbers[event["row"]]: event["metrics"]["loss"] for event in events if event["event"] == "evaluated"}
    return [{"steps": (round_steps or 0) * number, "loss": loss} for number, loss in sorted(found.items())]


def _choices(events: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Which modules were active from which step on, where the run chose any."""
    found = {event["step"]: event["active"] for event in events if event["event"] == "modules_chosen" and event["reason"] == "choice"}
    return ({"step": step, "active": active} for step, active in found.items())


def _scores(config_path: Path, adapter: Path | None, spec: Spec) -> dict[str, float]:
    """Loss per completion token, and the task's metric on test rows, by the whole base in this process."""
    from atoll.adapters.attach import attached
    from atoll.adapters.peft_files import load_adapter
    from atoll.base.load import load_base
    from atoll.tasks.evaluate import evaluate
    from atoll.tasks.rows import load_rows
    from atoll.tasks.text import text_form

    task, config = TASKS[spec.task], load(config_path).config
    rows = load_rows(f"data/{spec.task}-{spec.part}.jsonl", base_dir=config_path.parent, limit=None, on_bad_row="error")
    metrics = (task.metric,) if task.metric is not None and spec.part == "test" else ()
    settings = Evaluate.model_validate({"metrics": metrics, **task.evaluate})
    base, form = load_base(config.model.base), text_form(config.data, rows.columns)
    if adapter is None:
        return evaluate(base, rows, form, settings, max_length=config.data.max_length)
    with attached(base.model, load_adapter(adapter)):
        return evaluate(base, rows, form, settings, max_length=config.data.max_length)


def source_digest() -> str:
    """Of the code that ran: results of different code do not belong into one table."""
    root, digest = Path(atoll.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


class Results:
    """The runs that finished: those that the result file keeps, and results.jsonl in the work folder, a line for each."""

    def __init__(self, work: Path, kept: Iterable[Record] = ()) -> None:
        self.work = work
        self._path = work / "results.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self.records: dict[str, Record] = {record["key"]: record for record in (*kept, *map(json.loads, lines))}

    def get(self, spec: Spec) -> Record | None:
        """The finished run of this spec, under this spec's name; None where there is none, or can be none."""
        try:
            found = self.records.get(spec.key(self.work))
        except InputError:
            return None
        return None if found is None else dict(found) | {"setting": spec.setting}

    def add(self, record: Record) -> None:
        """Append one line."""
        self.records[record["key"]] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def perform_all(specs: Sequence[Spec], results: Results, jobs: int, deadline: float, keep: Callable[[], None]) -> list[str]:
    """Run what is not finished, several at once, each in a process of its own; after the deadline nothing new starts.

    `keep` is called after every run.

    Returns a line for every run that failed or was left.
    """
    keyed, problems, done = {}, [], 0
    for spec in specs:
        try:
            keyed[spec.key(results.work)] = spec
        except AtollError as error:
            problems.append(f"{_name(spec)}: {_page(error)}")
    keyed = {key: spec for key, spec in keyed.items() if key not in results.records}
    waiting = list(keyed.items())
    with fresh_processes(jobs) as pool:
        running: dict[Future[dict[str, Any]], Spec] = {}
        while running or waiting:
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                key, spec = waiting.pop(0)
                running[pool.submit(perform, spec, results.work, key)] = spec
            if not running:
                break
            future = next(as_completed(running))
            spec, done = running.pop(future), done + 1
            problem = future.exception()
            if problem is not None:
                problems.append(f"{_name(spec)}: {_page(problem)}")
                print(f"[{done}/{len(keyed)}] failed {problems[-1]}", flush=True)
                continue
            results.add(future.result())
            keep()
            print(f"[{done}/{len(keyed)}] {_line(spec, future.result())}", flush=True)
    return problems + [f"{_name(spec)}: not started" for _, spec in waiting]


def _page(problem: BaseException) -> str:
    return problem.page() if isinstance(problem, AtollError) else f"{type(problem).__name__}: {problem}"


def _name(spec: Spec) -> str:
    return f"{spec.task} {spec.setting} lr {spec.learning_rate:g} seed {spec.seed} {spec.part}"


def _line(spec: Spec, record: Record) -> str:
    scores = {name: round(value, 4) for name, value in record["scores"].items() if not name.startswith("num_")}
    if "traffic" not in record:
        return f"{_name(spec)}: {scores}"
    written = (record["traffic"]["up_bytes"] + record["traffic"]["down_bytes"]) / 1e6
    seconds = f"{record['train_seconds']:.0f} s of {record['wall_seconds']:.0f} s"
    return f"{_name(spec)}: {scores}, {written:.0f} MB, active {record['active_share']:.3f}, {seconds}"
