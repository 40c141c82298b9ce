"""FedAdapter: adapters that grow in stages, from the top blocks down and from narrow to wide.

Source: Cai et al., "Efficient Federated Learning for Modern NLP", MobiCom 2023. Simplified: stages follow each other at rounds that are set
before; the paper lets groups of edges try a deeper, a wider and the present setting beside each other, goes on with what gains most in the
time, and keeps the activations of the blocks below from round to round. Adapters stand beside the projections, not between the sublayers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from atoll.config.schema import RunConfig
from atoll.planner.as_written import spans_at
from atoll.planner.edge_plan import EdgePlan, LeftOut, Span
from atoll.planner.planner import Planned
from atoll.planner.request import PlanRequest, RanksOf
from atoll.shapes import BaseShapes


class FedAdapter:
    """[plan] policy = "fedadapter"."""

    grows = True

    def stages(self, config: RunConfig) -> tuple[tuple[int, int], ...]:
        """Rounds before each stage, and rounds in it: at the beginning of each, the plan is made anew."""
        return tuple((stage.first_round, stage.num_rounds) for stage in growth_stages(config))

    def plan(self, request: PlanRequest) -> Planned:
        """A span for each stage; in force is that of the rounds that are done."""
        spans, left_out = _growing(request)
        return Planned(spans, _of_stage(request.config, spans, request.rounds_done), left_out)


@dataclass(frozen=True, slots=True)
class GrowthStage:
    """Some rounds with adapters of one width on the top blocks."""

    number: int
    """From 1."""
    num_stages: int
    first_round: int
    """Rounds before it."""
    num_rounds: int
    rank: int
    """Width of every adapter."""

    def modules(self, shapes: BaseShapes, names: Sequence[str]) -> tuple[str, ...]:
        """Those of `names` in the top ceil(number / num_stages) of the blocks that hold any of them."""
        block_of = {module.name: module.block for module in shapes.modules}
        blocks = sorted({block_of[name] for name in names}, reverse=True)
        top = set(blocks[: -(-len(blocks) * self.number // self.num_stages)])
        return tuple(name for name in names if block_of[name] in top)


def growth_stages(config: RunConfig) -> tuple[GrowthStage, ...]:
    """One stage for each of [plan] ranks; rounds are divided as evenly as they can be, and there is at least one for each."""
    ranks, rounds = config.plan.ranks, config.run.rounds
    starts = [number * rounds // len(ranks) for number in range(len(ranks) + 1)]
    return tuple(
        GrowthStage(number + 1, len(ranks), starts[number], starts[number + 1] - starts[number], rank) for number, rank in enumerate(ranks)
    )


def growth_stage_after(config: RunConfig, rounds_done: int) -> GrowthStage:
    """The stage of the round that follows so many."""
    return next(stage for stage in reversed(growth_stages(config)) if stage.first_round <= rounds_done)


def _growing(request: PlanRequest) -> tuple[list[Span], list[LeftOut]]:
    """A span for each stage, whose ranks are those of all edges."""

    def ranks_of(stage: GrowthStage) -> RanksOf:
        ranks = dict.fromkeys(stage.modules(request.shapes, request.pool), stage.rank)
        return lambda edge: ranks

    return spans_at(request, [(stage.num_rounds, ranks_of(stage)) for stage in growth_stages(request.config)])


def _of_stage(config: RunConfig, spans: Sequence[Span], rounds_done: int) -> list[EdgePlan]:
    """What edges do in the stage after so many rounds, with the memory that the whole run takes."""
    now = growth_stage_after(config, rounds_done)
    first, end = now.first_round + 1, now.first_round + now.num_rounds
    rounds = f"round {end}" if first == end else f"rounds {first} to {end}"
    found = []
    for stages in zip(*(span.plans for span in spans), strict=True):
        plan, peaks = stages[now.number - 1], [one.predicted_peak_bytes for one in stages]
        most = max(reversed(range(len(stages))), key=peaks.__getitem__) + 1
        words = f"stage {now.number} of {now.num_stages} ({rounds}); {plan.why}"
        if most != now.number:
            words += f"; memory is that of stage {most}: {stages[most - 1].why}"
        found.append(dataclasses.replace(plan, predicted_peak_bytes=max(peaks), why=words))
    return found
