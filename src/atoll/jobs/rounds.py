"""Run the rounds: Flower's strategy and client apps over the in-process grid, told as events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from atoll.adapters.state import AdapterState
from atoll.cost.formulas import Flops, step_flops
from atoll.cost.traffic import WireAccount, WireBytes
from atoll.cost.work import Work
from atoll.engines.federated.client import EdgeWork, client_app
from atoll.engines.federated.flower import ConfigRecord, Context, RecordDict
from atoll.engines.federated.grid import InProcessGrid
from atoll.engines.federated.strategy import AdapterStrategy, EdgeResult, Observer, RoundResult
from atoll.engines.local import LocalTrainer
from atoll.engines.trainer import FitPlan, StepReport
from atoll.jobs.job import Job, Participant
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
from atoll.selection.plan import EdgePlan
from atoll.selection.split import elsewhere, step_bytes, step_round_trips


class Accountant(Protocol):
    """Who is told what the rounds cost and what came out of them."""

    def add(self, result: RoundResult) -> None:
        """A round ended."""

    def drop(self, edge: str) -> None:
        """A round went on without this edge."""


def run_rounds(job: Job, edges: tuple[Participant, ...], phase: Phase, log: EventLog, accountant: Accountant | None = None) -> AdapterState:
    """Federated rounds over these edges, in this process; the common adapter after the last one.

    Raises: EdgesLostError where a round gets fewer updates than [federated] min_edges.
    """
    config = job.config
    nodes = {number + 1: edge.name for number, edge in enumerate(edges)}
    total = config.run.rounds * sum(edge.plan.num_steps for edge in edges)
    log.append(PhaseStarted(phase, total))

    def round_finished(result: RoundResult) -> None:
        up, down = sum(edge.up_bytes for edge in result.edges), sum(edge.down_bytes for edge in result.edges)
        names = tuple(edge.edge for edge in result.edges)
        log.append(RoundFinished(phase, result.round, names, result.discarded_share, up, down, result.seconds))
        if accountant is not None:
            accountant.add(result)

    def edge_dropped(round_number: int, edge: str, reason: str) -> None:
        log.append(EdgeDropped(round_number, edge, reason))
        if accountant is not None:
            accountant.drop(edge)

    observer = Observer(
        round_started=lambda number: log.append(RoundStarted(phase, number, config.run.rounds)),
        edge_finished=lambda number, result: log.append(_edge_finished(phase, number, result)),
        edge_dropped=edge_dropped,
        round_finished=round_finished,
    )
    strategy = AdapterStrategy(
        state=job.start, edge_ranks={edge.name: edge.plan.ranks for edge in edges}, nodes=nodes,
        min_edges=min(config.federated.min_edges, len(edges)), observer=observer,
    )  # fmt: skip
    works = {edge.name: edge_work(job, edge, phase, log) for edge in edges}
    contexts = {node: Context(1, node, {"edge": name}, RecordDict(), {}) for node, name in nodes.items()}
    grid = InProcessGrid(client_app(lambda context: works[str(context.node_config["edge"])]), contexts)
    strategy.start(grid, strategy.arrays(), config.run.rounds, config.federated.round_timeout, ConfigRecord({"phase": phase}))
    return strategy.state


def edge_work(job: Job, edge: Participant, phase: Phase, log: EventLog) -> EdgeWork:
    """One edge's trainer, data and plan."""
    config, plan = job.config, edge.plan

    def on_step(round_number: int, report: StepReport) -> None:
        if report.turn is not None:
            turn, policy = report.turn, config.select.policy
            log.append(ModulesChosen(
                phase, round_number, edge.name, report.step, turn.reason, policy, report.active, turn.killed, turn.revived, turn.scores
            ))  # fmt: skip
        log.append(StepDone(
            phase, round_number, edge.name, report.step, report.loss, report.learning_rate, report.grad_norm,
            report.num_tokens, report.num_label_tokens, len(report.active),
        ))  # fmt: skip

    trainer = LocalTrainer(
        job.base, config.train, total_steps=config.run.rounds * plan.num_steps, dropout=config.adapter.dropout, seed=config.run.seed,
        edge=edge.name, chooser=edge.chooser if edge.chooser.schedule.ever else None,
    )  # fmt: skip
    account = WireAccount()
    if plan.mode == "split":
        assert job.split is not None
        client = job.split.client
        client.on_lost = lambda reason: log.append(HostLost(edge.name, reason))
        trainer, account = replace(trainer, base=job.split.base, attempt=client.patiently), client.account
    return EdgeWork(
        name=edge.name,
        trainer=trainer,
        account=account,
        batches=edge.batches,
        num_examples=len(edge.examples),
        plan=FitPlan(plan.num_steps, plan.accumulate, plan.gradient_checkpointing),
        keep_optimizer=config.train.optimizer_state == "keep",
        work_of=lambda report: _work(job, plan, report),
        uploaded_bytes=edge.uploaded_bytes if plan.mode == "cloud" else None,
        on_step=on_step,
    )


def _work(job: Job, plan: EdgePlan, report: StepReport) -> Work:
    active = {name: plan.ranks[name] for name in report.active}
    if plan.mode == "cloud":  # Nothing is done on the edge.
        return Work(num_active=len(active), num_pool=len(plan.ranks))
    killed = {name: rank for name, rank in plan.ranks.items() if name not in active and job.config.select.killed == "offload"}
    handed_over = {name: plan.ranks[name] for name in report.handed_over}
    trips = step_round_trips(job.config, job.shapes, active, num_exchanges=len(report.micro_batches), killed=handed_over)
    return Work(
        _flops(job, plan, report, active, killed), _wire_bytes(job, plan, report, active, handed_over),
        _flops(job, plan, report, plan.ranks, {}), _wire_bytes(job, plan, report, plan.ranks, {}), len(active), len(plan.ranks),
        trips if plan.mode == "split" else 0,
    )  # fmt: skip


def _flops(job: Job, plan: EdgePlan, report: StepReport, active: Mapping[str, int], killed: Mapping[str, int]) -> Flops:
    rows, positions = sum(rows for rows, _ in report.micro_batches), sum(rows * width for rows, width in report.micro_batches)
    return step_flops(
        job.shapes, active, num_rows=rows, row_tokens=round(positions / rows), num_label_tokens=report.num_label_tokens,
        gradient_checkpointing=plan.gradient_checkpointing, elsewhere=elsewhere(job.config, job.shapes) if plan.mode == "split" else (),
        killed=killed, factored=job.config.wire.mode == "factored", num_real_tokens=report.num_tokens,
    )  # fmt: skip


def _wire_bytes(job: Job, plan: EdgePlan, report: StepReport, active: Mapping[str, int], handed_over: Mapping[str, int]) -> WireBytes:
    if plan.mode != "split":
        return WireBytes()
    return step_bytes(
        job.config, job.shapes, active, num_tokens=report.num_tokens, num_label_tokens=report.num_label_tokens,
        num_exchanges=len(report.micro_batches), killed=handed_over,
    )  # fmt: skip


def _edge_finished(phase: Phase, round_number: int, result: EdgeResult) -> EdgeFinished:
    return EdgeFinished(
        phase, round_number, result.edge, result.num_steps, result.mean_loss, result.up_bytes, result.down_bytes,
        result.peak_bytes, result.seconds,
    )  # fmt: skip
