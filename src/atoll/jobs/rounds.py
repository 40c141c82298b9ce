"""Run the rounds: Flower's strategy and client apps over the in-process grid, told as events."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self

from atoll.adapters.state import AdapterState
from atoll.cost.traffic import WireAccount
from atoll.engines.federated.client import EdgeWork, client_app
from atoll.engines.federated.flower import ConfigRecord
from atoll.engines.federated.grid import InProcessGrid
from atoll.engines.federated.importance import Asked, EdgeWarmUp, ask_importance
from atoll.engines.federated.parts import Aggregation
from atoll.engines.federated.store import EdgeStates
from atoll.engines.federated.strategy import AdapterStrategy, EdgeResult, Observer, RoundResult
from atoll.engines.local import LocalTrainer
from atoll.engines.trainer import FitPlan, StepReport
from atoll.engines.warming import Warmed, WarmUp, warm_up
from atoll.jobs.clock import clock_of
from atoll.jobs.job import Job, Participant
from atoll.jobs.steps import step_work
from atoll.runs.events import (
    EdgeDropped,
    EdgeFinished,
    EventLog,
    HostLost,
    ModulesChosen,
    Phase,
    PhaseStarted,
    RoundFinished,
    RoundStarted,
    StepDone,
)


class Accountant(Protocol):
    """Who is told what the rounds cost and what came out of them."""

    def add(self, result: RoundResult, simulated_seconds: float | None) -> None:
        """A round ended."""

    def drop(self, edge: str) -> None:
        """A round went on without this edge."""


def run_rounds(job: Job, edges: tuple[Participant, ...], phase: Phase, log: EventLog, accountant: Accountant | None = None) -> AdapterState:
    """All federated rounds over these edges, in this process; the common adapter after the last one.

    Raises: EdgesLostError where a round gets fewer updates than [federated] min_edges.
    """
    log.append(PhaseStarted(phase, job.config.run.rounds * sum(edge.plan.num_steps for edge in edges)))
    with Rounds(job, edges, phase, log, accountant) as rounds:
        rounds.run(job.config.run.rounds)
        return rounds.state


class Rounds:
    """The edges of a run and its coordinator, in this process, from one round to another; a context, at whose end edges' states go."""

    def __init__(
        self, job: Job, edges: tuple[Participant, ...], phase: Phase, log: EventLog, accountant: Accountant | None = None
    ) -> None:  # fmt: skip
        self._job, self._phase, self._log, self._accountant = job, phase, log, accountant
        self._nodes = {number + 1: edge.name for number, edge in enumerate(edges)}
        self._steps_before: Counter[str] = Counter()
        self._late: set[str] = set()
        self._clock = clock_of(job.config)
        self._works: dict[str, EdgeWork] = {}
        self._states = EdgeStates(self._nodes)
        self._grid = InProcessGrid(client_app(lambda context: self._works[str(context.node_config["edge"])]), self._states)
        self._strategy = AdapterStrategy(
            job.start, edge_ranks={edge.name: edge.plan.ranks for edge in edges}, nodes=self._nodes,
            min_edges=min(job.config.federated.min_edges, len(edges)), observer=self._observer(),
            aggregation=_aggregation(job, phase), seed=job.config.run.seed, lateness=self._lateness,
        )  # fmt: skip
        self._edges = edges
        self._give_work()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._states.close()

    @property
    def state(self) -> AdapterState:
        """The common adapter."""
        return self._strategy.state

    @property
    def num_done(self) -> int:
        """Rounds so far."""
        return self._strategy.rounds_before

    def warm_up(self) -> Asked:
        """The scores that edges give the modules, each on its own data; those with too little memory for it are not asked.

        Raises: EdgesLostError where nobody answered.
        """
        self._give_work()  # A later warm-up draws other start values.
        adapter = self.state if self.num_done or self._job.config.adapter.start else None
        asked = {edge.name for edge in self._edges if edge.warm_up is not None}
        return ask_importance(
            self._grid, {node: name for node, name in self._nodes.items() if name in asked}, self._job.plan.pool, adapter=adapter,
            round_number=self.num_done,
            timeout=self._job.config.federated.round_timeout,
        )  # fmt: skip

    def replan(self, job: Job, edges: tuple[Participant, ...]) -> None:
        """Go on by another plan for the same edges."""
        self._job, self._edges = job, edges
        self._strategy.replan({edge.name: edge.plan.ranks for edge in edges}, job.start)
        self._give_work()

    def run(self, num_rounds: int) -> None:
        """Some more rounds.

        Raises: EdgesLostError where a round gets fewer updates than [federated] min_edges.
        """
        # Nothing else goes with the adapter: rounds of one kind cost the same bytes under any name.
        timeout = self._job.config.federated.round_timeout
        self._strategy.start(self._grid, self._strategy.arrays(), num_rounds, timeout, ConfigRecord({}))
        self._strategy.rounds_before += num_rounds
        self._steps_before.update({edge.name: num_rounds * edge.plan.num_steps for edge in self._edges})

    def _give_work(self) -> None:
        rounds_left = self._job.config.run.rounds - self.num_done
        for edge in self._edges:
            total = self._steps_before[edge.name] + rounds_left * edge.plan.num_steps
            self._works[edge.name] = edge_work(self._job, edge, self._phase, self._log, total, self.num_done)

    def _observer(self) -> Observer:
        return Observer(
            round_started=lambda number: self._log.append(RoundStarted(self._phase, number, self._job.config.run.rounds)),
            edge_finished=lambda number, result: self._log.append(_edge_finished(self._phase, number, result)),
            edge_dropped=self._edge_dropped,
            round_finished=self._round_finished,
        )

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
        names = tuple(edge.edge for edge in result.edges)
        self._log.append(RoundFinished(self._phase, result.round, names, result.discarded_share, up, down, result.seconds, simulated))
        if self._accountant is not None:
            self._accountant.add(result, simulated)

    def _edge_dropped(self, round_number: int, edge: str, reason: str) -> None:
        self._log.append(EdgeDropped(round_number, edge, reason))
        if self._accountant is not None:
            self._accountant.drop(edge)


def edge_work(job: Job, edge: Participant, phase: Phase, log: EventLog, total_steps: int, round_number: int = 0) -> EdgeWork:
    """One edge's trainer, data and plan; `total_steps` are those of the whole run, and `round_number` the rounds done before."""
    config, plan = job.config, edge.plan

    def on_step(round_number: int, report: StepReport) -> None:
        if report.turn is not None:
            turn, policy = report.turn, config.select.policy
            log.append(ModulesChosen(
                phase, round_number, edge.name, report.step, turn.reason, policy, report.active, turn.killed, turn.revived, turn.scores
            ))  # fmt: skip
        log.append(_step_done(phase, round_number, edge.name, report))

    trainer = LocalTrainer(
        job.base_of(plan), config.train, total_steps=total_steps, dropout=config.adapter.dropout, seed=config.run.seed,
        edge=edge.name, chooser=edge.chooser if edge.chooser.schedule.ever else None,
    )  # fmt: skip
    account = WireAccount()
    if plan.mode == "split":
        assert job.split is not None
        client = job.split.client
        client.on_lost = lambda reason: log.append(HostLost(edge.name, reason))
        trainer, account = replace(trainer, attempt=client.patiently), client.account
    return EdgeWork(
        name=edge.name,
        trainer=trainer,
        account=account,
        batches=edge.batches,
        num_examples=len(edge.examples),
        plan=FitPlan(plan.num_steps, plan.accumulate, plan.gradient_checkpointing),
        # Where adapters start anew in every round, there is nothing that old moments belong to.
        keep_optimizer=config.train.optimizer_state == "keep" and _aggregation(job, phase) != "stack",
        work_of=lambda report: step_work(job, plan, report),
        uploaded_bytes=edge.uploaded_bytes if plan.mode == "cloud" else None,
        on_step=on_step,
        warm_up=_Warming(job, edge, log, round_number).as_work(),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Warming:
    """How one edge scores modules."""

    job: Job
    edge: Participant
    log: EventLog
    round_number: int

    def as_work(self) -> EdgeWarmUp | None:
        """None where nothing is to be scored, or this edge cannot."""
        if self.edge.warm_up is None:
            return None
        plan = replace(
            self.edge.plan, ranks=dict.fromkeys(self.job.plan.pool, self.job.config.plan.warmup_rank),
            gradient_checkpointing=self.edge.warm_up.gradient_checkpointing,
        )  # fmt: skip
        return EdgeWarmUp(self.scores, lambda report: step_work(self.job, plan, report))

    def scores(self, adapter: AdapterState | None) -> Warmed:
        """Of every module, on the edge's own data."""
        config, plan, job = self.job.config, self.edge.plan, self.job
        assert config.plan.importance != "none"
        assert self.edge.warm_up is not None
        settings = WarmUp(
            config.plan.importance, config.plan.warmup_steps, config.plan.warmup_rank, config.adapter.alpha, config.train,
            config.run.seed, self.edge.name, self.round_number, self.edge.warm_up.gradient_checkpointing,
        )  # fmt: skip
        if plan.mode == "split":
            assert job.split is not None
            settings = replace(settings, attempt=job.split.client.patiently)
        sizes = {module.name: (module.d_in, module.d_out) for module in job.shapes.modules if module.name in job.plan.pool}
        warmed = warm_up(job.base_of(plan), sizes, self.edge.warm_up.batches, settings, adapter)
        for report in warmed.reports:
            self.log.append(_step_done("warm-up", self.round_number, self.edge.name, report))
        return warmed


def _step_done(phase: Phase, round_number: int, edge: str, report: StepReport) -> StepDone:
    return StepDone(
        phase, round_number, edge, report.step, report.loss, report.learning_rate, report.grad_norm, report.num_tokens,
        report.num_label_tokens, len(report.active),
    )  # fmt: skip


def _aggregation(job: Job, phase: Phase) -> Aggregation:
    """The comparison rows are plain training of one adapter, whatever the rule of the federation."""
    return job.config.federated.aggregation if phase == "federated" else "exact-svd"


def _edge_finished(phase: Phase, round_number: int, result: EdgeResult) -> EdgeFinished:
    return EdgeFinished(
        phase, round_number, result.edge, result.num_steps, result.mean_loss, result.up_bytes, result.down_bytes,
        result.peak_bytes, result.seconds,
    )  # fmt: skip
