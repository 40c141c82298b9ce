"""What a run cost, added up round by round into summary.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from atoll.config.schema import Edge
from atoll.cost.formulas import Flops, round_seconds
from atoll.cost.traffic import WireBytes
from atoll.engines.federated.strategy import EdgeResult, RoundResult
from atoll.jobs.job import Job
from atoll.runs.summary import Durations, EdgeCompute, EdgeSummary, Evaluation, Summary, Traffic, versions
from atoll.selection.split import round_trips


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
        flops = sum((edge.flops for edge in results), Flops(0, 0, 0))
        return Summary(
            status=status,
            eval=evaluation,
            traffic=_traffic(results, split=any(edge.mode == "split" for edge in self._job.plan.edges)),
            # Every module is active all the time in this version, so that the full pool is what was done.
            edge_compute=EdgeCompute(flops.flops, flops.adapter_flops, flops.head_flops, flops.block_flops, flops.adapter_flops),
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
            measured_peak_bytes=max((edge.peak_bytes for edge in results), default=None), active_share=1.0,
            up_bytes=sum(edge.up_bytes for edge in results), down_bytes=sum(edge.down_bytes for edge in results),
            dropped_rounds=self._dropped[name],
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
        plan = self._job.plan.edge(result.edge) if result.edge in self._names() else None
        trips = round_trips(self._job.config, self._job.shapes, plan.ranks, result.num_steps) if plan and plan.mode == "split" else 1
        return round_seconds(
            result.flops.flops, result.up_bytes + result.down_bytes, flops_per_second=declared.flops, bits_per_second=declared.bandwidth,
            latency_seconds=declared.latency, round_trips=trips,
        )  # fmt: skip


def _traffic(results: Sequence[EdgeResult], *, split: bool) -> Traffic:
    up, down = sum(edge.up_bytes for edge in results), sum(edge.down_bytes for edge in results)
    if not split:
        return Traffic(up, down)
    formula = sum((edge.formula for edge in results), WireBytes())
    sent, received = (sum((getattr(edge.wire, way) for edge in results), Counter[str]()) for way in ("sent", "received"))
    # Every module is active all the time in this version, so that the full pool is what was done.
    shared, unshared = formula.shared_bytes, formula.unshared_bytes
    return Traffic(up, down, shared, unshared, shared, unshared, dict(sent), dict(received))


