"""What a step of an edge cost, by formula."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.cost.formulas import Flops, step_flops
from atoll.cost.split_traffic import remote_blocks, step_bytes, step_round_trips
from atoll.cost.traffic import WireBytes
from atoll.cost.work import Work
from atoll.jobs.job import Job
from atoll.planner.edge_plan import EdgePlan
from atoll.training.trainer import StepReport


def step_work(job: Job, plan: EdgePlan, report: StepReport) -> Work:
    """One step by the edge's plan, and beside it the same with every module active."""
    active = {name: plan.ranks[name] for name in report.active if name in plan.ranks}  # A classifier's head is always trained.
    if plan.mode == "cloud":  # Nothing is done on the edge.
        return Work(num_active=len(active), num_pool=len(plan.ranks))
    killed = {name: rank for name, rank in plan.ranks.items() if name not in active and job.config.select.killed == "offload"}
    offloaded = {name: plan.ranks[name] for name in report.offloaded}
    trips = step_round_trips(job.config, job.shapes, active, num_exchanges=len(report.micro_batches), killed=offloaded)
    return Work(
        _flops(job, plan, report, active, killed), _wire_bytes(job, plan, report, active, offloaded),
        _flops(job, plan, report, plan.ranks, {}), _wire_bytes(job, plan, report, plan.ranks, {}), len(active), len(plan.ranks),
        trips if plan.mode == "split" else 0,
    )  # fmt: skip


def _flops(job: Job, plan: EdgePlan, report: StepReport, active: Mapping[str, int], killed: Mapping[str, int]) -> Flops:
    rows, positions = sum(rows for rows, _ in report.micro_batches), sum(rows * width for rows, width in report.micro_batches)
    frozen = {name: killed.get(name, 0) + report.frozen_delta.get(name, 0) for name in {*killed, *report.frozen_delta}}
    remote = remote_blocks(job.config, job.shapes) if plan.mode == "split" else ()
    return step_flops(
        job.shapes, active, num_rows=rows, row_tokens=round(positions / rows), num_label_tokens=report.num_label_tokens,
        gradient_checkpointing=plan.gradient_checkpointing, remote_blocks=remote,
        frozen=frozen, wire_mode=job.config.wire.mode, num_real_tokens=report.num_tokens,
    )  # fmt: skip


def _wire_bytes(job: Job, plan: EdgePlan, report: StepReport, active: Mapping[str, int], offloaded: Mapping[str, int]) -> WireBytes:
    if plan.mode != "split":
        return WireBytes()
    return step_bytes(
        job.config, job.shapes, active, num_tokens=report.num_tokens, num_label_tokens=report.num_label_tokens,
        num_exchanges=len(report.micro_batches), killed=offloaded,
    )  # fmt: skip
