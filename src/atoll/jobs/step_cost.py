"""What a step of an edge cost, by formula."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.cost.formulas import Flops, host_flops, step_flops
from atoll.cost.split_traffic import remote_blocks, step_bytes, step_round_trips
from atoll.cost.traffic import WireBytes
from atoll.cost.work import Work
from atoll.jobs.job import Job
from atoll.planner.edge_plan import EdgePlan
from atoll.training.trainer import StepReport
from atoll.wire.byte_formulas import WireMode


def step_work(job: Job, plan: EdgePlan, report: StepReport) -> Work:
    """One step by the edge's plan, and beside it the same with every module active.

    The wire mode is the plan's, which is made with every module active, while some are killed: another mode might then be quicker, but a
    session, and what is foretold of the whole pool beside it, would change with every choice.
    """
    active = {name: plan.ranks[name] for name in report.active if name in plan.ranks}  # A classifier's head is always trained.
    if plan.mode == "cloud":  # Nothing is done on the edge.
        return Work(num_active=len(active), num_pool=len(plan.ranks))
    killed = {name: rank for name, rank in plan.ranks.items() if name not in active and job.config.select.killed == "offload"}
    offloaded = {name: plan.ranks[name] for name in report.offloaded}
    if plan.wire_mode is None:
        trips, there = 0, 0
    else:
        trips = step_round_trips(job.config, job.shapes, active, plan.wire_mode, num_exchanges=len(report.micro_batches), killed=offloaded)
        there = _host_flops(job, plan, report, active, killed, plan.wire_mode)
    return Work(
        _flops(job, plan, report, active, killed), _wire_bytes(job, plan, report, active, offloaded),
        _flops(job, plan, report, plan.ranks, {}), _wire_bytes(job, plan, report, plan.ranks, {}), len(active), len(plan.ranks),
        trips, there,
    )  # fmt: skip


def _flops(job: Job, plan: EdgePlan, report: StepReport, active: Mapping[str, int], killed: Mapping[str, int]) -> Flops:
    rows, row_tokens = _rows(report)
    frozen = {name: killed.get(name, 0) + report.frozen_delta.get(name, 0) for name in {*killed, *report.frozen_delta}}
    remote = remote_blocks(job.config, job.shapes) if plan.mode == "split" else ()
    return step_flops(
        job.shapes, active, num_rows=rows, row_tokens=row_tokens, num_label_tokens=report.num_label_tokens,
        gradient_checkpointing=plan.gradient_checkpointing, remote_blocks=remote,
        frozen=frozen, wire_mode=plan.wire_mode or "dense", num_real_tokens=report.num_tokens,
    )  # fmt: skip


def _host_flops(
    job: Job, plan: EdgePlan, report: StepReport, active: Mapping[str, int], killed: Mapping[str, int], mode: WireMode
) -> int:
    rows, row_tokens = _rows(report)
    return host_flops(
        job.shapes, active, num_rows=rows, row_tokens=row_tokens, remote_blocks=remote_blocks(job.config, job.shapes),
        gradient_checkpointing=plan.gradient_checkpointing, frozen=killed, wire_mode=mode,
    )  # fmt: skip


def _rows(report: StepReport) -> tuple[int, int]:
    """Of all micro-batches, and the mean of their padded tokens."""
    rows, positions = sum(rows for rows, _ in report.micro_batches), sum(rows * width for rows, width in report.micro_batches)
    return rows, round(positions / rows)


def _wire_bytes(job: Job, plan: EdgePlan, report: StepReport, active: Mapping[str, int], offloaded: Mapping[str, int]) -> WireBytes:
    if plan.wire_mode is None:
        return WireBytes()
    return step_bytes(
        job.config, job.shapes, active, plan.wire_mode, num_tokens=report.num_tokens, num_label_tokens=report.num_label_tokens,
        num_exchanges=len(report.micro_batches), killed=offloaded,
    )  # fmt: skip
