"""Run the rounds: Flower's strategy and a backend of edges, told as events."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from atoll.adapters.state import AdapterState
from atoll.federated.aggregation.aggregate import Common
from atoll.federated.flower import ConfigRecord, RecordDict
from atoll.federated.importance_query import Asked, ask_importance
from atoll.federated.payload import FROZEN_DELTA, get_adapter, put_adapter
from atoll.federated.store import read_record, write_record
from atoll.federated.strategy import AdapterStrategy, EdgeResult, Observer, RoundResult
from atoll.jobs.backends.backend import BackendFactory, WorkOrder
from atoll.jobs.backends.in_process import InProcessBackend, aggregation_of, precision_of, robust_of
from atoll.jobs.clock import clock_of
from atoll.jobs.job import Job, Participant
from atoll.planner.plan_fleet import steps_per_round
from atoll.runs.events import EdgeDropped, EdgeFinished, EventLog, Phase, PhaseStarted, RoundFinished, RoundStarted, UpdateClipped

_COMMON, _STEPS, _STATES = "common.state", "steps.json", "edges"


class RoundCallback(Protocol):
    """Who is told what the rounds cost and what came out of them."""

    def add(self, result: RoundResult, simulated_seconds: float | None, rounds: Rounds) -> None:
        """A round ended; these `rounds` can be saved as they are now."""

    def drop(self, edge: str) -> None:
        """A round went on without this edge."""

    def replan(self, job: Job) -> None:
        """Rounds go on with other edges."""


def run_rounds(
    job: Job, edges: tuple[Participant, ...], phase: Phase, log: EventLog, callback: RoundCallback | None = None,
    make_backend: BackendFactory = InProcessBackend,
) -> AdapterState:  # fmt: skip
    """All federated rounds over these edges; the common adapter after the last one.

    Raises: EdgesLostError where a round gets fewer updates than [federated] min_edges.
    """
    with Rounds(job, edges, phase, log, callback, make_backend) as rounds:
        rounds.run(job.config.run.rounds)
        return rounds.state


class Rounds:
    """The edges of a run and its coordinator, from one round to another; a context, at whose end the backend is let go."""

    def __init__(
        self, job: Job, edges: tuple[Participant, ...], phase: Phase, log: EventLog, callback: RoundCallback | None = None,
        make_backend: BackendFactory = InProcessBackend,
    ) -> None:  # fmt: skip
        self._job, self._phase, self._log, self._callback = job, phase, log, callback
        self._steps_before: Counter[str] = Counter()
        self._late: set[str] = set()
        self._first_rounds: dict[str, int] = {}
        """Of edges that came while rounds went on."""
        self._clock = clock_of(job.config)
        self._backend = make_backend(job, edges, phase, log)
        self._strategy = AdapterStrategy(
            job.start, edge_ranks={edge.name: edge.plan.ranks for edge in edges}, nodes=self._backend.nodes, votes=_votes(job, edges),
            min_edges=min(job.config.federated.min_edges, len(edges)), observer=self._observer(),
            aggregation=aggregation_of(job, phase), options=job.config.options_of(aggregation_of(job, phase)),
            seed=job.config.run.seed, lateness=self._lateness,
            work_order_of=self._backend.work_order_record, run_id=job.run_id, phase=phase, base_digests=self._backend.base_digests,
            precision=precision_of(job, phase), robust=robust_of(job, phase), patience=job.config.federated.patience,
            max_norm=job.config.federated.max_norm if phase == "federated" else None,
        )  # fmt: skip
        self._edges = edges
        self._assign_work()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._backend.close()

    @property
    def state(self) -> AdapterState:
        """The common adapter."""
        return self._strategy.state

    def given(self) -> dict[str, Common]:
        """What each edge would train in another round, and what lies frozen under it."""
        return self._strategy.given()

    @property
    def job(self) -> Job:
        """By whose plan they go."""
        return self._job

    @property
    def num_done(self) -> int:
        """Rounds so far."""
        return self._strategy.rounds_before

    def warm_up(self) -> Asked:
        """The scores that edges give the modules, each on its own data; those with too little memory for it are not asked.

        Raises: EdgesLostError where nobody answered.
        """
        self._assign_work()  # A later warm-up draws other start values.
        adapter = self.state if self.num_done or self._job.config.adapter.start else None
        asked = {edge.name for edge in self._edges if edge.warm_up is not None}
        return ask_importance(
            self._backend.grid, {node: name for node, name in self._backend.nodes.items() if name in asked}, self._job.plan.pool,
            adapter=adapter, round_number=self.num_done, timeout=self._job.config.federated.round_timeout,
            work_order_of=self._backend.work_order_record, precision=self._strategy.precision,
        )  # fmt: skip

    def replan(self, job: Job, edges: tuple[Participant, ...]) -> None:
        """Go on by another plan for the same edges."""
        self._job, self._edges = job, edges
        self._strategy.replan({edge.name: edge.plan.ranks for edge in edges}, _votes(job, edges), job.start)
        self._assign_work()

    def run(self, num_rounds: int) -> None:
        """Some more rounds.

        Raises: EdgesLostError where a round gets fewer updates than [federated] min_edges.
        """
        self._log.append(PhaseStarted(self._phase, num_rounds * sum(edge.plan.num_steps for edge in self._edges)))
        # Nothing else goes with the adapter: rounds of one kind cost the same bytes under any name.
        timeout = self._job.config.federated.round_timeout
        self._strategy.start(self._backend.grid, self._strategy.arrays(), num_rounds, timeout, ConfigRecord({}))
        self._steps_before = self._steps_after(self.num_done + num_rounds)
        self._strategy.rounds_before += num_rounds

    def save(self, folder: Path, num_done: int) -> None:
        """Write all that goes on from round to round, bit for bit, into a new folder; told after round `num_done`."""
        folder.mkdir()
        record, common = RecordDict(), self._strategy.common
        put_adapter(record, common.trained)
        if common.frozen_delta is not None:
            put_adapter(record, common.frozen_delta, FROZEN_DELTA)
        write_record(folder / _COMMON, record)
        steps = {"rounds": num_done, "steps": self._steps_after(num_done)}
        (folder / _STEPS).write_text(json.dumps(steps) + "\n", encoding="utf-8")
        self._backend.save(folder / _STATES)

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote by a job with the same plan."""
        record = read_record(folder / _COMMON)
        self._strategy.common = Common(get_adapter(record), get_adapter(record, FROZEN_DELTA) if FROZEN_DELTA in record else None)
        saved = json.loads((folder / _STEPS).read_text(encoding="utf-8"))
        self._strategy.rounds_before, self._steps_before = saved["rounds"], Counter(saved["steps"])
        self._backend.restore(folder / _STATES)
        self._assign_work()

    def _steps_after(self, num_done: int) -> Counter[str]:
        """Steps that every edge was to do in so many rounds."""
        here = {edge.name: num_done - self._done_before(edge.name) for edge in self._edges}
        return self._steps_before + Counter({edge.name: here[edge.name] * edge.plan.num_steps for edge in self._edges})

    def _done_before(self, edge: str) -> int:
        """Rounds before those that this edge takes part in from now on."""
        return max(self.num_done, self._first_rounds.get(edge, 1) - 1)

    def _assign_work(self) -> None:
        left = {edge.name: self._job.config.run.rounds - self._done_before(edge.name) for edge in self._edges}
        steps = {edge.name: self._steps_before[edge.name] + left[edge.name] * edge.plan.num_steps for edge in self._edges}
        self._backend.give(self._job, self._edges, [
            WorkOrder(edge.name, edge.plan, self._phase, steps[edge.name], self.num_done) for edge in self._edges
        ])  # fmt: skip

    def _take_in(self, job: Job, number: int) -> None:
        """Go on with other edges from this round on."""
        known = {edge.name for edge in self._edges}
        self._first_rounds |= {edge.name: number for edge in job.edges if edge.name not in known}
        self._job, self._edges = job, job.edges
        self._clock = clock_of(job.config)
        self._assign_work()
        nodes = {node: name for node, name in self._backend.nodes.items() if name in {edge.name for edge in job.edges}}
        self._strategy.take_part(nodes, {edge.name: edge.plan.ranks for edge in job.edges}, _votes(job, job.edges))
        if self._callback is not None:
            self._callback.replan(job)

    def _observer(self) -> Observer:
        return Observer(
            round_started=self._round_started,
            edge_finished=lambda number, result: self._log.append(_edge_finished(self._phase, number, result)),
            edge_dropped=self._edge_dropped,
            round_finished=self._round_finished,
        )

    def _round_started(self, number: int) -> None:
        changed = self._backend.changed(self._job, number) if self._phase == "federated" else None
        if changed is not None:
            self._take_in(changed, number)
        names = tuple(edge.name for edge in self._edges)
        self._log.append(RoundStarted(self._phase, number, self._job.config.run.rounds, names))

    def _seconds(self, result: EdgeResult) -> float | None:
        return self._clock.edge_seconds(result.edge, result.work, result.up_bytes + result.down_bytes)

    def _lateness(self, result: EdgeResult) -> str | None:
        # The comparison rows are plain training, which nobody waits for.
        reason = self._clock.lateness(self._seconds(result)) if self._phase == "federated" else None
        self._late |= {result.edge} if reason is not None else set()
        return reason

    def _round_finished(self, result: RoundResult) -> None:
        up, down = sum(edge.up_bytes for edge in result.edges), sum(edge.down_bytes for edge in result.edges)
        simulated = self._clock.round_seconds([self._seconds(edge) for edge in result.edges], len(self._late))
        self._late.clear()
        for one in result.clipped:
            self._log.append(UpdateClipped(result.round, one.edge, one.norm, one.limit))
        names = tuple(edge.edge for edge in result.edges)
        self._log.append(RoundFinished(self._phase, result.round, names, result.discarded_share, up, down, result.seconds, simulated))
        if self._callback is not None:
            self._callback.add(result, simulated, self)

    def _edge_dropped(self, round_number: int, edge: str, reason: str) -> None:
        self._log.append(EdgeDropped(round_number, edge, reason))
        if self._callback is not None:
            self._callback.drop(edge)


def _votes(job: Job, edges: tuple[Participant, ...]) -> dict[str, float]:
    """How often the examples of each edge count; of those that are not named, once."""
    if job.config.federated.weigh == "rows":
        return {}
    return {edge.name: edge.plan.num_steps / steps_per_round(job.config, edge.num_rows) for edge in edges}


def _edge_finished(phase: Phase, round_number: int, result: EdgeResult) -> EdgeFinished:
    return EdgeFinished(
        phase, round_number, result.edge, result.num_steps, result.mean_loss, result.up_bytes, result.down_bytes,
        result.peak_bytes, result.seconds,
    )  # fmt: skip
