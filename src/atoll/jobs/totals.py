"""What a run cost, added up round by round into summary.json."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from atoll.cost.formulas import adapter_parameters
from atoll.cost.meters import FirstStep
from atoll.cost.traffic import WireAccount
from atoll.cost.work import Work
from atoll.federated.importance_query import Asked, EdgeScores
from atoll.federated.strategy import EdgeResult, RoundResult
from atoll.jobs.clock import clock_of
from atoll.jobs.job import Job
from atoll.jobs.personal.asked import CopyElsewhere
from atoll.jobs.personal.copies import PersonalCopy
from atoll.jobs.rounds import Rounds
from atoll.planner.edge_plan import EdgePlan
from atoll.runs.summary import (
    Durations,
    EdgeCompute,
    EdgeSummary,
    Evaluation,
    FirstStepFlops,
    LeftOutSummary,
    Summary,
    Traffic,
    WireSummary,
    versions,
)

_NUMBERS = ("steps", "up_bytes", "down_bytes", "peak_bytes", "dropped_rounds", "first_round")


@dataclass(slots=True)
class _Total:
    """What one edge did so far: a sum, so that memory does not grow with rounds."""

    steps: int = 0
    trained: Work = field(default_factory=Work)
    """Of the rounds alone."""
    work: Work = field(default_factory=Work)
    up_bytes: int = 0
    down_bytes: int = 0
    wire: WireAccount = field(default_factory=WireAccount)
    peak_bytes: int | None = None
    first_step: FirstStep | None = None
    dropped_rounds: int = 0
    first_round: int = 1
    """From which on it takes part."""

    def add(self, result: EdgeResult | EdgeScores | PersonalCopy | CopyElsewhere) -> None:
        """Count a round, or a warm-up."""
        self.work += result.work
        self.up_bytes, self.down_bytes = self.up_bytes + result.up_bytes, self.down_bytes + result.down_bytes
        self.wire.sent.update(result.wire.sent)
        self.wire.received.update(result.wire.received)

    def add_round(self, result: EdgeResult) -> None:
        """Count a round."""
        self.add(result)
        self.steps += result.num_steps
        # What was planned is training, not the warm-up before it.
        self.peak_bytes = max(self.peak_bytes or 0, result.peak_bytes)
        self.trained += result.work
        self.first_step = self.first_step or result.first_step

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        first = None if self.first_step is None else self.first_step.to_numbers()
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        works = {"trained": self.trained.to_numbers(), "work": self.work.to_numbers()}
        return {**numbers, **works, "sent": dict(self.wire.sent), "received": dict(self.wire.received), "first_step": first}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` made."""
        total = cls(
            trained=Work.from_numbers(value["trained"]), work=Work.from_numbers(value["work"]),
            wire=WireAccount(Counter(value["sent"]), Counter(value["received"])),
            first_step=None if value["first_step"] is None else FirstStep.from_numbers(value["first_step"]),
        )  # fmt: skip
        for name in _NUMBERS:
            setattr(total, name, value.get(name, getattr(total, name)))  # Older runs do not say all of it.
        return total


class RunTotals:
    """Adds up the federated rounds; comparison rows are not part of what the run costs."""

    def __init__(self, job: Job) -> None:
        self._job, self._clock = job, clock_of(job.config)
        self._totals: defaultdict[str, _Total] = defaultdict(_Total)
        self._seconds: list[float | None] = []
        self._num_done = 0

    def to_json(self) -> dict[str, object]:
        """What was counted so far, as JSON values."""
        edges = {name: total.to_json() for name, total in self._totals.items()}
        return {"edges": edges, "seconds": self._seconds, "rounds": self._num_done}

    def restore(self, value: Mapping[str, Any]) -> None:
        """Go on from what `to_json` made."""
        self._totals.update({name: _Total.from_json(total) for name, total in value["edges"].items()})
        self._seconds, self._num_done = list(value["seconds"]), value.get("rounds", 0)

    def replan(self, job: Job) -> None:
        """Go on with another plan, or other edges."""
        before = {edge.name for edge in self._job.plan.edges}
        for name in {edge.name for edge in job.plan.edges} - before:
            self._totals[name].first_round = self._num_done + 1
        self._job, self._clock = job, clock_of(job.config)

    def add(self, result: RoundResult, simulated_seconds: float | None, rounds: Rounds) -> None:
        """Count one round."""
        self._num_done = result.round
        for edge in result.edges:
            self._totals[edge.edge].add_round(edge)
        self._seconds.append(simulated_seconds)

    def add_warm_up(self, asked: Asked) -> float | None:
        """Count what finding the importance of weights cost; how long it took by declared speeds and links."""
        for one in asked.edges:
            self._totals[one.edge].add(one)
        seconds = [self._clock.edge_seconds(one.edge, one.work, one.up_bytes + one.down_bytes) for one in asked.edges]
        self._seconds.append(self._clock.round_seconds(seconds, 0))
        return self._seconds[-1]

    def add_personal(self, copies: Sequence[PersonalCopy | CopyElsewhere]) -> None:
        """Count what edges' own copies cost after the last round: no message, and no step of a round."""
        for one in copies:
            self._totals[one.edge].add(one)
        if copies:
            self._seconds.append(self._clock.round_seconds([self._clock.edge_seconds(one.edge, one.work, 0) for one in copies], 0))

    def drop(self, edge: str) -> None:
        """Count a round that went on without an edge."""
        self._totals[edge].dropped_rounds += 1

    def summary(self, status: Literal["complete", "interrupted", "failed"], evaluation: Evaluation, seconds: float) -> Summary:
        """The summary of what was counted so far."""
        totals, plan = list(self._totals.values()), self._job.plan
        work = sum((total.work for total in totals), Work())
        flops, full_pool = work.flops, work.full_pool_flops
        return Summary(
            status=status,
            eval=evaluation,
            traffic=_traffic(totals, work, split=any(edge.mode == "split" for edge in plan.edges)),
            edge_compute=EdgeCompute(
                flops.flops, flops.adapter_flops, flops.head_flops, flops.block_flops, full_pool.adapter_flops, full_pool.block_flops
            ),
            seconds=Durations(seconds, self.simulated_seconds),
            edges=tuple(self._edge(edge) for edge in plan.edges),
            left_out=tuple(LeftOutSummary(edge.name, edge.why) for edge in plan.left_out),
            wire={edge.name: WireSummary(edge.wire_mode, edge.wire_why) for edge in plan.edges if edge.wire_mode is not None},
            versions=versions(),
        )

    def _edge(self, plan: EdgePlan) -> EdgeSummary:
        total = self._totals.get(plan.name, _Total())
        return EdgeSummary(
            name=plan.name, mode=plan.mode, bits=plan.bits, batch_size=plan.batch_size, ranks=plan.ranks, steps=total.steps,
            predicted_peak_bytes=plan.predicted_peak_bytes,
            measured_peak_bytes=total.peak_bytes if plan.mode != "cloud" else None,
            active_share=total.trained.active_share, up_bytes=total.up_bytes, down_bytes=total.down_bytes,
            dropped_rounds=total.dropped_rounds, num_trainable=adapter_parameters(self._job.shapes, plan.ranks),
            under_training=plan.under_training,
            first_round=total.first_round, first_step_flops=None if total.first_step is None else _first_step(total.first_step),
        )  # fmt: skip

    @property
    def simulated_seconds(self) -> float | None:
        """Of all rounds and warm-ups so far, by declared speeds and links; None where one of them is not known."""
        known = [one for one in self._seconds if one is not None]
        return sum(known) if known and len(known) == len(self._seconds) else None


def _first_step(first: FirstStep) -> FirstStepFlops:
    counted, formula = first.counted, first.formula
    return FirstStepFlops(
        counted.block_and_adapter_flops, formula.block_flops + formula.adapter_flops, counted.head_flops, formula.head_flops
    )


def _traffic(totals: Sequence[_Total], work: Work, *, split: bool) -> Traffic:
    up, down = sum(total.up_bytes for total in totals), sum(total.down_bytes for total in totals)
    if not split:
        return Traffic(up, down)
    sent, received = (sum((getattr(total.wire, way) for total in totals), Counter[str]()) for way in ("sent", "received"))
    done, full_pool = work.wire, work.full_pool_wire
    return Traffic(
        up, down, done.shared_bytes, done.unshared_bytes, full_pool.shared_bytes, full_pool.unshared_bytes, dict(sent), dict(received)
    )
