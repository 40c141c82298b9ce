"""atoll train: private shards in, one standard adapter out."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from atoll.adapters.attach import attached
from atoll.adapters.fresh import head_state
from atoll.adapters.peft_files import save_adapter
from atoll.adapters.state import AdapterState
from atoll.config.load import resolved
from atoll.errors import InputError, RunFolderError
from atoll.federated.aggregation.aggregate import Common
from atoll.federated.strategy import RoundResult
from atoll.jobs.backends.backend import BackendFactory
from atoll.jobs.backends.in_process import InProcessBackend
from atoll.jobs.exports.card import PEFT, write_card
from atoll.jobs.federation import run_federation, run_homogeneous
from atoll.jobs.inputs import eval_rows
from atoll.jobs.job import Job, prepared
from atoll.jobs.personal.asked import copies_elsewhere
from atoll.jobs.personal.copies import personal_copy, personal_order
from atoll.jobs.personal.held_out import check_own_rows, with_own_rows
from atoll.jobs.results.adapter import check_result, written_form
from atoll.jobs.results.config import Given, check_begun_with, given_config, run_config
from atoll.jobs.results.trained_on import base_notes
from atoll.jobs.resume_state import ResumePoint, RunState, changes_since, hashes_of, hashes_of_members, write_resume_state
from atoll.jobs.rounds import Rounds, run_rounds
from atoll.jobs.split import HostAccess
from atoll.jobs.totals import RunTotals
from atoll.planner.importance import Importance
from atoll.report.figures import write_figures
from atoll.report.runs.losses import write_losses
from atoll.runs.checkpoints import write_checkpoint
from atoll.runs.disk import disk_told
from atoll.runs.events import Advised, CheckpointWritten, EdgeLeftOut, Evaluated, Event, EventLog, PhaseStarted, RunFinished, RunStarted
from atoll.runs.files import write_folder
from atoll.runs.layout import RunDirectory
from atoll.runs.shelf import RUNS
from atoll.runs.summary import Evaluation, Homogeneous, LocalOnly, Scores, Summary, versions, write_summary
from atoll.runs.tracker import TrackedRun, Tracking
from atoll.selection.selector import schedule_warning
from atoll.tasks.evaluate import evaluate
from atoll.tasks.rows import RowProblem
from atoll.tasks.text import text_form

_LONGEST_PROMPT = 160
NOT_SCORED = "no rows are held out, so nothing is scored: [data] eval names some, or validation_share keeps a share of train"


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to, and where it lies."""

    run_dir: Path
    adapter: Path
    summary: Summary
    figures: tuple[Path, ...]
    """What was drawn of its losses and of the choice of modules, in the run directory's report folder."""


def train(
    config_path: str | Path, *, out: str | Path | None = None, overrides: Sequence[str] = (),
    observers: Sequence[Callable[[Event], None]] = (), host: HostAccess | None = None, trust: bool = False,
) -> RunResult:  # fmt: skip
    """Train as run.toml says, and return the run's directory, adapter and summary. With a `host`, edges hold a part of the base only.

    Of a run's folder in place of run.toml, train that run again, by the config that held then: its adapter comes out with the same bits,
    and observers are told what has changed since.

    Everything that can be wrong with the input is found before the run directory is made.

    Raises: InputError, InfeasibleError (nothing was written); TrustError where a run's folder names code and `trust` does not say that it
    may; PeerError, KeyboardInterrupt (work is saved in the run directory).
    """
    given = given_config(Path(config_path), overrides, trust=trust)
    if given.again is not None and given.noted is not None:
        check_begun_with(given.again, given.noted, has_host=host is not None, on_fleet=False)
    return train_job(prepared(given.loaded, host), out, observers, given=given)


def train_job(
    job: Job, out: str | Path | None, observers: Sequence[Callable[[Event], None]], make_backend: BackendFactory | None = None,
    given: Given | None = None,
) -> RunResult:  # fmt: skip
    """The same for a run that is made ready already; `make_backend` makes its backends, None: in this process."""
    try:
        check_own_rows(job)
        hashes = hashes_of(job)
        run = RunDirectory.create_at(Path(out)) if out is not None else RunDirectory.create(RUNS, job.config.run.name)
        with disk_told(run):
            run.write_config(job.loaded.toml_text, _resolved(job, run, hashes, given))
            run.write_json(run.plan_json, job.plan.to_json())
            with EventLog(run.events_path, observers) as log:
                track(job, run, log)
                _begin(job, run, log)
                for note in _changes(given, hashes):
                    log.append(Advised("", note))
                return go_on(job, run, log, hashes, make_backend=make_backend)
    finally:
        job.close()


def track(job: Job, run: RunDirectory, log: EventLog) -> None:
    """Have the trackers of [track] hear what is logged from here on."""
    config = job.config
    if config.track.to:
        tracked = TrackedRun(run.path.name, run.path, resolved(config))
        log.show_to(Tracking(config.track.to, config.options, tracked, lambda advice: log.append(Advised("", advice))))


def go_on(
    job: Job, run: RunDirectory, log: EventLog, hashes: Mapping[str, object], *, resume_point: ResumePoint | None = None,
    make_backend: BackendFactory | None = None,
) -> RunResult:  # fmt: skip
    """The run from its start, or from its `resume_point`; `hashes` are those of the job."""
    started = time.monotonic() - (0.0 if resume_point is None else resume_point.run_state.wall_seconds)
    totals = RunTotals(job)
    if resume_point is not None:
        totals.restore(resume_point.run_state.totals)
    on = _Run(job, run, totals, log, hashes, started, make_backend or partial(InProcessBackend, folder=run.states))
    try:
        summary = on.finish("complete", on.train(resume_point))
    except BaseException as problem:
        is_told = isinstance(problem, KeyboardInterrupt)
        if not is_told or on.complete is None:  # It may come between the summary and the word of it.
            run.mark(problem)
            with suppress(OSError, RunFolderError):  # What went wrong may be that nothing can be written.
                on.finish("interrupted" if is_told else "failed", Evaluation())
                write_losses(run)
            raise
        summary = on.complete
    try:
        figures = _described(job, run, log)
    except KeyboardInterrupt:  # It comes too late to interrupt the run.
        log.append(Advised("", "the run is complete; it was ended before its model card and figures were drawn"))
        figures = ()
    return RunResult(run.path, run.adapter, summary, figures)


def _begin(job: Job, run: RunDirectory, log: EventLog) -> None:
    log.append(RunStarted(run.path.name, job.config.run.seed, job.config.run.rounds, tuple(edge.name for edge in job.edges)))
    for event in job.data_events:
        log.append(event)
    for edge_out in job.plan.left_out:
        log.append(EdgeLeftOut(edge_out.name, edge_out.why))
    if job.held_out is None:
        log.append(Advised("", NOT_SCORED))
    for remark in job.plan.remarks:
        log.append(Advised("", remark))
    for edge in job.edges:
        warning = schedule_warning(edge.selector, job.config.run.rounds * edge.plan.num_steps)
        if warning is not None:
            log.append(Advised(edge.name, warning))


@dataclass(slots=True, eq=False)
class _Run:
    """A run on its way: saves every round, and passes the figures on."""

    job: Job
    """As it was planned first, until the federated rounds are over; then as it was planned last."""
    run: RunDirectory
    totals: RunTotals
    log: EventLog
    hashes: Mapping[str, object]
    started: float
    make_backend: BackendFactory
    base: Scores | None = None
    importance: Importance | None = None
    complete: Summary | None = None
    """As its folder has it."""

    def train(self, resume_point: ResumePoint | None) -> Evaluation:
        """All rounds that are left, and what they are compared with."""
        job, log = self.job, self.log
        if resume_point is None:
            self.base = _score(job, None, "base", log)
        else:
            self.base = resume_point.run_state.base_scores
        job, state, given = run_federation(job, log, self.totals, self, self._planned, self.make_backend, resume_point)
        _save(job, state, self.run.adapter)
        adapted = _score(job, state, "federated", log)
        compare, others = job.config.run.compare, dict[str, dict[str, AdapterState]]()
        local_only = _local_only(job, self.run, log, self.make_backend, others) if "local-only" in compare else None
        central = None
        if job.central is not None:
            alone = run_rounds(job, (job.central,), "central", log, make_backend=self.make_backend)
            central, others["central"] = _score(job, alone, "central", log), {edge.name: alone for edge in job.edges}
        homogeneous = _homogeneous(job, log, self.make_backend) if "homogeneous" in compare else None
        personal = self._personal(job, state, given, others) if given else None
        return Evaluation(self.base, adapted, local_only, central, homogeneous, personal)

    def _personal(
        self, job: Job, state: AdapterState, given: Mapping[str, Common], others: Mapping[str, Mapping[str, AdapterState]]
    ) -> Mapping[str, Mapping[str, Scores]]:
        """Every edge's own copy, and what all adapters are worth on its own held-out rows."""
        self.log.append(PhaseStarted("personal", len(job.edges) * (job.config.federated.personal_steps or 0)))
        if any(edge.examples is None for edge in job.edges):
            elsewhere = copies_elsewhere(job, state, given, self.make_backend, self.log)
            self.totals.add_personal(elsewhere)
            return {one.edge: one.scores for one in elsewhere}
        copies = [personal_copy(job, edge, personal_order(job, edge), given[edge.name], self.log) for edge in job.edges]
        self.totals.add_personal(copies)
        found: dict[str, Mapping[str, Scores]] = {}
        for copy in copies:
            _save(job, copy.state, self.run.personal_adapter(copy.edge))
            own, told = with_own_rows(job, copy.edge)
            for event in told:
                self.log.append(event)
            states = {"base": None, **{row: each[copy.edge] for row, each in others.items()}, "federated": state, "personal": copy.state}
            scores = {row: _score(own, one, f"{row.replace('_', '-')}:{copy.edge}", self.log) for row, one in states.items()}
            found[copy.edge] = {row: one for row, one in scores.items() if one is not None}
        return found

    def add(self, result: RoundResult, simulated_seconds: float | None, rounds: Rounds) -> None:
        """Write the round's checkpoint, whole or not at all."""
        self.totals.add(result, simulated_seconds, rounds)

        def write(folder: Path) -> None:
            _write_adapter(self.job, result.state, folder)
            run_state = RunState(self.totals.to_json(), self.base, time.monotonic() - self.started, self.importance)
            write_resume_state(folder, rounds, result.round, run_state, self.hashes)

        path = write_checkpoint(self.run, result.round, write)
        self._keep_members(rounds.job)
        self.log.append(CheckpointWritten(result.round, str(path.relative_to(self.run.path))))
        every = self.job.config.evaluate.every
        if every is not None and result.round % every == 0 and result.round < self.job.config.run.rounds:
            _score(self.job, result.state, f"round-{result.round}", self.log)

    def drop(self, edge: str) -> None:
        """Count the edge's absence."""
        self.totals.drop(edge)

    def replan(self, job: Job) -> None:
        """Keep the plan of the edges that take part now."""
        self.totals.replan(job)
        self._planned(self.importance, job)
        self.hashes = {**self.hashes, **hashes_of_members(job)}

    def _keep_members(self, job: Job) -> None:
        """Whoever goes on after a stop goes on with the edges of the last checkpoint."""
        noted = self.run.read_config()
        if noted.get("hashes") != self.hashes:
            began = noted.get("began") or {"config": noted["config"], "hashes": noted["hashes"]}
            self.run.write_json(self.run.config_json, {**noted, "config": resolved(job.config), "hashes": self.hashes, "began": began})

    def finish(self, status: Literal["complete", "interrupted", "failed"], evaluation: Evaluation) -> Summary:
        """Write the summary."""
        seconds = time.monotonic() - self.started
        summary = self.totals.summary(status, evaluation, seconds)
        write_summary(self.run.summary_path, summary)
        self.complete = summary if status == "complete" else None
        self.log.append(RunFinished(status, seconds))
        return summary

    def _planned(self, importance: Importance | None, job: Job) -> None:
        self.importance = importance
        if importance is not None:
            self.run.write_json(self.run.importance_json, importance.to_json())
        self.run.write_json(self.run.plan_json, job.plan.to_json())


def _homogeneous(job: Job, log: EventLog, make_backend: BackendFactory) -> Homogeneous | None:
    found = run_homogeneous(job, log, make_backend)
    if found is None:
        return None
    other, state, seconds = found
    scores = _score(job, state, "homogeneous", log) or {}
    return Homogeneous(scores, tuple(edge.name for edge in other.edges), seconds)


def _local_only(
    job: Job, run: RunDirectory, log: EventLog, make_backend: BackendFactory, states: dict[str, dict[str, AdapterState]]
) -> LocalOnly:
    """Every edge alone, for as many steps as it trained in the federation; adds what came of it to `states`."""
    scores: dict[str, Scores] = {}
    for edge in job.edges:
        state = run_rounds(job, (edge,), "local-only", log, make_backend=make_backend)
        _save(job, state, run.edge_adapter(edge.name))
        states.setdefault("local_only", {})[edge.name] = state
        scores[edge.name] = _score(job, state, f"local-only:{edge.name}", log) or {}
    keys = next(iter(scores.values()))
    return LocalOnly({key: sum(row[key] or 0.0 for row in scores.values()) / len(scores) for key in keys}, scores)


def _score(job: Job, state: AdapterState | None, row: str, log: EventLog) -> Scores | None:
    if job.held_out is None or job.form is None:
        return None
    job.ready_to_score()
    log.append(PhaseStarted("evaluate", len(job.held_out if job.scored is None else job.scored)))
    settings, max_length = job.config.evaluate, job.config.data.max_length
    if state is None and job.base.head:
        state = head_state(job.base.head)  # Without one, a classifier tells nothing.
    with nullcontext() if state is None else attached(job.base.model, state):
        scores = evaluate(
            job.base, job.held_out, job.form, settings, max_length=max_length, examples=job.scored, options=job.config.options
        )
    log.append(Evaluated(row, scores))
    return scores


def _save(job: Job, state: AdapterState, folder: Path) -> None:
    check_result(job.base, state, job.loaded)
    write_folder(folder, lambda stage: _write_adapter(job, state, stage))


def _write_adapter(job: Job, state: AdapterState, folder: Path) -> None:
    form = written_form(job.base, job.loaded)
    try:
        save_adapter(
            state, folder, base_name=form.base_name, transposed=form.transposed, head=form.head, labels=form.labels,
            embeddings=form.embeddings, revision=form.revision,
        )  # fmt: skip
    except SafetensorError as problem:
        # safetensors keeps what the system says in its text alone.
        number = re.search(r"os error (\d+)", str(problem))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from problem


def _resolved(job: Job, run: RunDirectory, hashes: Mapping[str, object], given: Given | None) -> dict[str, object]:
    named: dict[str, object] = {"id2label": dict(enumerate(job.base.labels))} if job.base.labels else {}
    named |= {} if given is None or given.again is None else {"repeats": given.again.path.resolve().name}
    folder = str(job.loaded.path.resolve().parent)
    return {
        "config": resolved(job.config), "method": job.loaded.method, "overrides": job.loaded.overrides, "command": _command_line(),
        "started_in": str(Path.cwd()), "folder": folder,
        "folder_from_run": os.path.relpath(folder, run.path.resolve()), "has_host": job.has_host, "run_id": job.run_id,
        "asked_for": job.asked_for, "hashes": hashes, "form": None if job.form is None else job.form.kind,
        "base": base_notes(job.base, job.config, str(hashes["base_hash"])), "versions": versions(), **named,
    }  # fmt: skip


def _command_line() -> tuple[str, ...] | None:
    """As it was typed; None where a program called, whose arguments are its own."""
    program = Path(sys.argv[0])
    is_ours = program.stem == "atoll" or program.parts[-2:] == ("atoll", "__main__.py")
    return ("atoll", *sys.argv[1:]) if is_ours else None


def _changes(given: Given | None, hashes: Mapping[str, object]) -> list[str]:
    """What keeps a run from being the one that it repeats, in sentences."""
    if given is None or given.again is None or given.noted is None:
        return []
    before, kept, now = given.noted.get("hashes"), given.noted.get("versions"), versions()
    found = changes_since(before if isinstance(before, dict) else {}, hashes)
    if isinstance(kept, dict):
        found += [f"{name} {now.get(name)} in place of {version}" for name, version in kept.items() if now.get(name) != version]
    return [f"not {given.again.path.name} to the last bit, as this changed since: {one}" for one in found]


def _described(job: Job, run: RunDirectory, log: EventLog) -> tuple[Path, ...]:
    """The model card and the figures, which are returned; what cannot be written of them takes nothing away from the run."""
    try:
        write_card(run, job.loaded, run.adapter, PEFT)
        return (*write_losses(run), *write_figures(run))
    except (OSError, RunFolderError) as problem:
        log.append(Advised("", f"the model card or the figures could not be written: {problem}"))
        return ()


def example_prompt(run_dir: Path) -> str | None:
    """The prompt of the first held-out row of a run that this process trained, or went on with; None for a classifier.

    "..." where there is none that fits on a command line, or the rows are not there any more.

    Raises: RunFolderError.
    """
    run = RunDirectory.open(run_dir)
    try:
        return _example_prompt(run)
    except KeyboardInterrupt as problem:  # The run is complete, whoever hears of it.
        run.mark(problem)
        raise


def _example_prompt(run: RunDirectory) -> str | None:
    loaded = run_config(run, trust=True)
    if loaded.config.model.task == "classify":
        return None
    try:
        rows = eval_rows(run_config(run, trust=True, loads_parts=True))
        prompt = "..." if rows is None else text_form(loaded.config.data, rows.columns, rows[0]).question(rows[0])
    except (InputError, RowProblem):  # The run is done, and its data may have been moved since; or a bad row, that was skipped.
        return "..."
    return prompt if len(prompt) <= _LONGEST_PROMPT and prompt.isprintable() else "..."
