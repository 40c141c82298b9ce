"""Which blocks are adapted at all. Below the lowest adapted block nothing needs a gradient, so that steps are cheaper there.

Source: weights first, then ranks, batch and bits, as FedPipe's two stages (Fang et al., arXiv 2404.06448); the rule is Atoll's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from atoll.cost.formulas import step_flops
from atoll.shapes import BaseShapes

LEARNED = 1 / 3
"""What a step teaches grows as this power of the share of weights that are adapted (decision 0014, measured on one base)."""


def top_blocks(
    shapes: BaseShapes, pool: Sequence[str], depth: Literal["all", "auto"] | int, rank: int, row_tokens: int
) -> tuple[str, ...]:
    """Those of the pool in its top `depth` blocks; "auto": in so many that most is learned in a time, all of them at this rank."""
    block_of = {module.name: module.block for module in shapes.modules}
    blocks = sorted({block_of[name] for name in pool})

    def above(lowest: int) -> tuple[str, ...]:
        return tuple(name for name in pool if block_of[name] >= lowest)

    def pace(lowest: int) -> float:
        names = above(lowest)
        flops = step_flops(shapes, dict.fromkeys(names, rank), num_rows=1, row_tokens=row_tokens, num_label_tokens=row_tokens).flops
        # Not by importance: the lowest block may have half of a warm-up's, and teaches no more for it.
        return (len(names) / len(pool)) ** LEARNED / flops

    if depth == "auto":
        return above(max(blocks, key=pace))
    return tuple(pool) if depth == "all" else above(blocks[-min(depth, len(blocks))])
