"""atoll train: private shards in, one standard adapter out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.adapters.attach import attached
from atoll.adapters.fresh import head_state
from atoll.adapters.peft_files import save_adapter
from atoll.adapters.state import AdapterState
from atoll.config.load import config_hash, load, resolved
from atoll.engines.federated.strategy import RoundResult
from atoll.jobs.accounts import Accounts
from atoll.jobs.federation import run_federation, run_homogeneous
from atoll.jobs.job import Job, prepare
from atoll.jobs.rounds import run_rounds
from atoll.jobs.sources import eval_rows
from atoll.jobs.split import HostAccess
from atoll.report.figures import write_figures
from atoll.runs.checkpoints import write_checkpoint
from atoll.runs.events import Advised, CheckpointWritten, EdgeLeftOut, Evaluated, Event, EventLog, PhaseStarted, RunFinished, RunStarted
from atoll.runs.layout import RunDirectory
from atoll.runs.summary import Evaluation, Homogeneous, LocalOnly, Scores, Summary, versions, write_summary
from atoll.selection.choosing import full_pool_warning
from atoll.selection.importance import Importance
from atoll.tasks.evaluate import evaluate
from atoll.tasks.text import text_form

_LONGEST_PROMPT = 160


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to, and where it lies."""

    run_dir: Path
    adapter: Path
    summary: Summary
    figures: tuple[Path, ...]
    """What was drawn of the choice of modules, in the run directory's report folder; empty where every module is always trained."""


def train(
    config_path: str | Path, *, out: Path | None = None, overrides: Sequence[str] = (), observers: Sequence[Callable[[Event], None]] = (),
    host: HostAccess | None = None,
) -> RunResult:  # fmt: skip
    """Train as run.toml says, and return the run's directory, adapter and summary. With a `host`, edges hold a part of the base only.

    Everything that can be wrong with the input is found before the run directory is made.

    Raises: InputError, InfeasibleError (nothing was written); PeerError, KeyboardInterrupt (work is saved in the run directory).
    """
    return train_job(prepare(Path(config_path), overrides, host), out, observers)


def train_job(job: Job, out: Path | None, observers: Sequence[Callable[[Event], None]]) -> RunResult:
    """The same for a run that is made ready already."""
    try:
        return _run(job, out, observers)
    finally:
        job.close()


def _run(job: Job, out: Path | None, observers: Sequence[Callable[[Event], None]]) -> RunResult:
    started = time.monotonic()
    run = RunDirectory.create_at(out) if out is not None else RunDirectory.create(Path("runs"), job.config.run.name)
    run.write_config(job.loaded.toml_text, _resolved(job))
    run.write_json(run.plan_json, job.plan.to_json())
    accounts = Accounts(job)
    with EventLog(run.events_path, observers) as log:
        log.append(RunStarted(run.path.name, job.config.run.seed, job.config.run.rounds, tuple(edge.name for edge in job.edges)))
        for event in job.data_events:
            log.append(event)
        for edge_out in job.plan.left_out:
            log.append(EdgeLeftOut(edge_out.name, edge_out.why))
        for edge in job.edges:
            warning = full_pool_warning(edge.chooser, job.config.run.rounds * edge.plan.num_steps)
            if warning is not None:
                log.append(Advised(edge.name, warning))
        try:
            evaluation = _train(job, run, accounts, log)
        except BaseException as problem:
            run.mark(problem)
            _finish(run, log, accounts, "interrupted" if isinstance(problem, KeyboardInterrupt) else "failed", Evaluation(), started)
            raise
        summary = _finish(run, log, accounts, "complete", evaluation, started)
        figures = _figures(run, log)
    return RunResult(run.path, run.adapter, summary, figures)


@dataclass(frozen=True, slots=True)
class _Checkpointing:
    """Keeps every round's adapter, and passes the figures on."""

    job: Job
    run: RunDirectory
    accounts: Accounts
    log: EventLog

    def add(self, result: RoundResult, simulated_seconds: float | None) -> None:
        """Write the round's checkpoint, whole or not at all."""
        self.accounts.add(result, simulated_seconds)
        path = write_checkpoint(self.run, result.round, lambda folder: _save(self.job, result.state, folder))
        self.log.append(CheckpointWritten(result.round, str(path.relative_to(self.run.path))))
        every = self.job.config.evaluate.every
        if every is not None and result.round % every == 0 and result.round < self.job.config.run.rounds:
            _score(self.job, result.state, f"round-{result.round}", self.log)

    def drop(self, edge: str) -> None:
        """Count the edge's absence."""
        self.accounts.drop(edge)


def _train(job: Job, run: RunDirectory, accounts: Accounts, log: EventLog) -> Evaluation:
    base = _score(job, None, "base", log)

    def planned(importance: Importance | None, job: Job) -> None:
        if importance is not None:
            run.write_json(run.importance_json, importance.to_json())
        run.write_json(run.plan_json, job.plan.to_json())

    job, state = run_federation(job, log, accounts, _Checkpointing(job, run, accounts, log), planned)
    _save(job, state, run.adapter)
    adapted = _score(job, state, "federated", log)
    local_only = _local_only(job, run, log) if "local-only" in job.config.run.compare else None
    central = None if job.central is None else _score(job, run_rounds(job, (job.central,), "central", log), "central", log)
    homogeneous = _homogeneous(job, log) if "homogeneous" in job.config.run.compare else None
    return Evaluation(base, adapted, local_only, central, homogeneous)


def _homogeneous(job: Job, log: EventLog) -> Homogeneous | None:
    found = run_homogeneous(job, log)
    if found is None:
        return None
    other, state, seconds = found
    scores = _score(job, state, "homogeneous", log) or {}
    return Homogeneous(scores, tuple(edge.name for edge in other.edges), seconds)


def _local_only(job: Job, run: RunDirectory, log: EventLog) -> LocalOnly:
    """Every edge alone, for as many steps as it trained in the federation."""
    scores: dict[str, Scores] = {}
    for edge in job.edges:
        state = run_rounds(job, (edge,), "local-only", log)
        _save(job, state, run.edge_adapter(edge.name))
        scores[edge.name] = _score(job, state, f"local-only:{edge.name}", log) or {}
    keys = next(iter(scores.values()))
    return LocalOnly({key: sum(row[key] or 0.0 for row in scores.values()) / len(scores) for key in keys}, scores)


def _score(job: Job, state: AdapterState | None, row: str, log: EventLog) -> Scores | None:
    if job.held_out is None:
        return None
    log.append(PhaseStarted("evaluate", len(job.held_out)))
    settings, max_length = job.config.evaluate, job.config.data.max_length
    if state is None and job.base.head:
        state = head_state(job.base.head)  # Without one, a classifier tells nothing.
    if state is None:
        scores = evaluate(job.base, job.held_out, job.form, settings, max_length=max_length)
    else:
        with attached(job.base.model, state):
            scores = evaluate(job.base, job.held_out, job.form, settings, max_length=max_length)
    log.append(Evaluated(row, scores))
    return scores


def _save(job: Job, state: AdapterState, folder: Path) -> None:
    base = job.base
    save_adapter(state, folder, base_name=base.name, transposed=base.transposed, head=tuple(base.head), labels=base.labels)


def _resolved(job: Job) -> dict[str, object]:
    hashes = {"config_hash": config_hash(job.config), "base_hash": job.base.digest(), "start_digest": job.start.digest()}
    named = {"id2label": dict(enumerate(job.base.labels))} if job.base.labels else {}
    folder = str(job.loaded.path.resolve().parent)
    return {"config": resolved(job.config), "folder": folder, "hashes": hashes, "versions": versions(), **named}


def _finish(run: RunDirectory, log: EventLog, accounts: Accounts, status: str, evaluation: Evaluation, started: float) -> Summary:
    seconds = time.monotonic() - started
    summary = accounts.summary(status, evaluation, seconds)  # type: ignore[arg-type]
    write_summary(run.summary_path, summary)
    log.append(RunFinished(status, seconds))  # type: ignore[arg-type]
    return summary


def _figures(run: RunDirectory, log: EventLog) -> tuple[Path, ...]:
    """A figure that cannot be written takes nothing away from the run."""
    try:
        return write_figures(run)
    except OSError as problem:
        log.append(Advised("", f"the figures could not be written: {problem}"))
        return ()


def example_prompt(config_path: str | Path, *, overrides: Sequence[str] = ()) -> str | None:
    """The prompt of the first held-out row, or "..." where there is none that fits on a command line; None for a classifier.

    Raises: InputError leaves, as the run itself would.
    """
    loaded = load(Path(config_path), overrides)
    if loaded.config.model.task == "classify":
        return None
    rows = eval_rows(loaded)
    if rows is None:
        return "..."
    form = text_form(loaded.config.data, rows.columns)
    prompt = form.prompt.render(rows[0]) if form.prompt is not None else "..."
    return prompt if len(prompt) <= _LONGEST_PROMPT and "\n" not in prompt else "..."
