"""What a run cost, added up round by round into summary.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from atoll.config.schema import Edge
from atoll.cost.formulas import round_seconds
from atoll.cost.meters import FirstStep
from atoll.cost.work import Work
from atoll.engines.federated.strategy import EdgeResult, RoundResult
from atoll.jobs.job import Job
from atoll.runs.summary import Durations, EdgeCompute, EdgeSummary, Evaluation, FirstStepFlops, Summary, Traffic, versions


class Accounts:
    """Adds up the federated rounds; comparison rows are not part of what the run costs."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._rounds: list[RoundResult] = []
        self._dropped: Counter[str] = Counter()

    def add(self, result: RoundResult) -> None:
        """Count one round."""
        self._rounds.append(result)

    def drop(self, edge: str) -> None:
        """Count a round that went on without an edge."""
        self._dropped[edge] += 1

    def summary(self, status: Literal["complete", "interrupted", "failed"], evaluation: Evaluation, seconds: float) -> Summary:
        """The summary of what was counted so far."""
        results = [edge for result in self._rounds for edge in result.edges]
        work = sum((edge.work for edge in results), Work())
        flops, full_pool = work.flops, work.full_pool_flops
        return Summary(
            status=status,
            eval=evaluation,
            traffic=_traffic(results, work, split=any(edge.mode == "split" for edge in self._job.plan.edges)),
            edge_compute=EdgeCompute(
                flops.flops, flops.adapter_flops, flops.head_flops, flops.block_flops, full_pool.adapter_flops, full_pool.block_flops
            ),
            seconds=Durations(seconds, self._simulated_seconds()),
            edges=tuple(self._edge(name, [edge for edge in results if edge.edge == name]) for name in self._names()),
            versions=versions(),
        )

    def _names(self) -> list[str]:
        return [edge.name for edge in self._job.edges]

    def _edge(self, name: str, results: Sequence[EdgeResult]) -> EdgeSummary:
        plan = self._job.plan.edge(name)
        return EdgeSummary(
            name=name, mode=plan.mode, bits=plan.bits, batch_size=plan.batch_size, ranks=plan.ranks,
            steps=sum(edge.num_steps for edge in results), predicted_peak_bytes=plan.predicted_peak_bytes,
            measured_peak_bytes=max((edge.peak_bytes for edge in results), default=None) if plan.mode != "cloud" else None,
            active_share=sum((edge.work for edge in results), Work()).active_share,
            up_bytes=sum(edge.up_bytes for edge in results), down_bytes=sum(edge.down_bytes for edge in results),
            dropped_rounds=self._dropped[name],
            first_step_flops=next((_first_step(edge.first_step) for edge in results if edge.first_step is not None), None),
        )  # fmt: skip

    def _simulated_seconds(self) -> float | None:
        """Each round lasts as long as its slowest edge by declared speed and link; None where an edge declares nothing."""
        declared = {edge.name: edge for edge in self._job.config.edge}
        total = 0.0
        for result in self._rounds:
            seconds = [self._seconds(declared.get(edge.edge), edge) for edge in result.edges]
            known = [value for value in seconds if value is not None]
            if len(known) < len(seconds) or not known:
                return None
            total += max(known)
        return total if self._rounds else None

    def _seconds(self, declared: Edge | None, result: EdgeResult) -> float | None:
        if declared is None:
            return None
        return round_seconds(
            result.work.flops.flops, result.up_bytes + result.down_bytes, flops_per_second=declared.flops,
            bits_per_second=declared.bandwidth, latency_seconds=declared.latency,
            round_trips=1 + result.work.num_round_trips,  # The adapter comes and goes.
        )  # fmt: skip


def _first_step(first: FirstStep) -> FirstStepFlops:
    counted, formula = first.counted, first.formula
    return FirstStepFlops(
        counted.block_and_adapter_flops, formula.block_flops + formula.adapter_flops, counted.head_flops, formula.head_flops
    )


def _traffic(results: Sequence[EdgeResult], work: Work, *, split: bool) -> Traffic:
    up, down = sum(edge.up_bytes for edge in results), sum(edge.down_bytes for edge in results)
    if not split:
        return Traffic(up, down)
    sent, received = (sum((getattr(edge.wire, way) for edge in results), Counter[str]()) for way in ("sent", "received"))
    done, full_pool = work.wire, work.full_pool_wire
    return Traffic(
        up, down, done.shared_bytes, done.unshared_bytes, full_pool.shared_bytes, full_pool.unshared_bytes, dict(sent), dict(received)
    )
