"""FedAdapter: adapters that grow in stages, from the top blocks down and from narrow to wide.

Source: Cai et al., "Efficient Federated Learning for Modern NLP", MobiCom 2023. Simplified: stages follow each other at rounds that are set
before; the paper lets groups of edges try a deeper, a wider and the present setting beside each other, goes on with what gains most in the
time, and keeps the activations of the blocks below from round to round. Adapters stand beside the projections, not between the sublayers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atoll.config.schema import RunConfig
from atoll.shapes import BaseShapes


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
