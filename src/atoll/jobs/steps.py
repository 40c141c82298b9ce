"""What a step of an edge cost, by formula."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.cost.formulas import Flops, step_flops
from atoll.cost.traffic import WireBytes
from atoll.cost.work import Work
from atoll.engines.trainer import StepReport
from atoll.jobs.job import Job
from atoll.selection.rounds.plans import EdgePlan
from atoll.selection.split import elsewhere, step_bytes, step_round_trips


def step_work(job: Job, plan: EdgePlan, report: StepReport) -> Work:
    """One step by the edge's plan, and beside it the same with every module active."""
    active = {name: plan.ranks[name] for name in report.active if name in plan.ranks}  # A classifier's head is always trained.
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
    frozen = {name: killed.get(name, 0) + report.beneath.get(name, 0) for name in {*killed, *report.beneath}}
    return step_flops(
        job.shapes, active, num_rows=rows, row_tokens=round(positions / rows), num_label_tokens=report.num_label_tokens,
        gradient_checkpointing=plan.gradient_checkpointing, elsewhere=elsewhere(job.config, job.shapes) if plan.mode == "split" else (),
        frozen=frozen, factored=job.config.wire.mode == "factored", num_real_tokens=report.num_tokens,
    )  # fmt: skip


def _wire_bytes(job: Job, plan: EdgePlan, report: StepReport, active: Mapping[str, int], handed_over: Mapping[str, int]) -> WireBytes:
    if plan.mode != "split":
        return WireBytes()
    return step_bytes(
        job.config, job.shapes, active, num_tokens=report.num_tokens, num_label_tokens=report.num_label_tokens,
        num_exchanges=len(report.micro_batches), killed=handed_over,
    )  # fmt: skip
