"""Aggregation that bad updates move little: a limit on how far one may move, and the median or trimmed mean in place of the mean.

Coordinate-wise median and trimmed mean of the dense products s B A (not of A and B, which have no meaning alone), every edge's vote
counted the same, however much data it has. Source: Yin et al., 2018. Norm clipping. Source: Sun et al., 2019.

Shape suffixes: E edges, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.low_rank import squared_norm
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.config.checks.federation import rules_with
from atoll.errors import AdapterFitError
from atoll.federated.aggregation.norms import largest_norm
from atoll.federated.aggregation.spool import Contribution, Spool
from atoll.registry.parts import trait

Combine = Literal["mean", "median", "trimmed-mean"]
"""[federated] combine."""
_FAR_LARGER = 10
_BLOCK_NUMBERS = 1 << 22
"""Numbers of all edges together that are in memory at once while a module is combined."""


@dataclass(frozen=True, slots=True)
class Robust:
    """How much a single update may move."""

    combine: Combine = "mean"
    trim: float = 0.2
    """Share of the updates left out at each end of a trimmed mean."""
    clip: float | Literal["auto"] | None = None
    """Largest norm of an edge's change; "auto": the median of the round's norms."""

    def check(self, aggregation: str, state: AdapterState) -> None:
        """See that the rule has the products this needs.

        Raises: AdapterFitError.
        """
        asked = f'aggregation = "{aggregation}", {state.kind}'
        bottleneck = state.kind == "bottleneck"
        if self.combine != "mean" and (bottleneck or not trait("aggregation", aggregation, "takes_robust_means")):
            raise AdapterFitError(
                f'combine = "{self.combine}" is taken of products, cut to the common rank', got=asked, expected='"exact-svd", lora',
                do='write combine = "mean", or aggregation = "exact-svd" and adapter.kind = "lora"',
            )  # fmt: skip
        if self.clip is not None and (bottleneck or not trait("aggregation", aggregation, "works_on_products")):
            raise AdapterFitError(
                "clip_update shrinks a change of products", got=asked, expected=f"{' or '.join(rules_with('works_on_products'))}, lora",
                do='take clip_update out, or write aggregation = "exact-svd" and adapter.kind = "lora"',
            )  # fmt: skip

    def num_cut(self, num_edges: int) -> int:
        """How many of so many numbers are left out at each end; the median leaves the middle one, or two."""
        if self.combine == "median":
            return (num_edges - 1) // 2
        # 0.29 * 100 is less than 29 by rounding alone.
        return math.floor(self.trim * num_edges + 1e-9) if self.combine == "trimmed-mean" else 0


MEAN = Robust()
"""Every update moves as much as it says."""


def combined_product(spool: Spool, name: str, voters: Sequence[str], size: tuple[int, int], robust: Robust) -> Tensor:
    """The median or trimmed mean of one module's products, coordinate by coordinate.

    Shapes: (outputs, inputs), fp64.
    """
    num_inputs, num_outputs = size

    def rows(edge: str, start: int, stop: int) -> Tensor:
        return spool.product_rows(edge, name, start, stop)

    return _in_blocks(rows, voters, num_outputs, num_inputs, robust)


def combined_full_weights(spool: Spool, name: str, voters: Sequence[str], like: FullWeightDelta, robust: Robust) -> FullWeightDelta:
    """The median or trimmed mean of what one module's weight (and bias) was changed by."""
    tensors = []
    for side, tensor in zip(("change", "bias"), like.tensors, strict=False):

        def rows(edge: str, start: int, stop: int, side: str = side) -> Tensor:
            return spool.full_weight_rows(edge, name, side, start, stop)

        tensors.append(_in_blocks(rows, voters, len(tensor), tensor[0].numel(), robust).float())
    return like.of(tuple(tensors))


@dataclass(frozen=True, slots=True)
class Clipped:
    """An update that was shrunk."""

    edge: str
    norm: float
    """Of its change, as it came."""
    limit: float
    """To this."""


def clip_updates(spool: Spool, limit: float | Literal["auto"], sent: Callable[[str], AdapterState]) -> list[Clipped]:
    """Shrink the change of every update that moved further than the limit from what its edge was sent; the others keep every bit.

    A shrunk update may be in fp64, and of another rank.
    """
    norms = {each.edge: moved(each.state, sent(each.edge)) for each in spool}
    most = statistics.median(norms.values()) if limit == "auto" else limit
    clipped = [Clipped(edge, norm, most) for edge, norm in norms.items() if norm > most]
    for one in clipped:
        update = spool.read(one.edge)
        spool.put(Contribution(one.edge, _shrunk(update.state, sent(one.edge), most / one.norm), update.weight))
    return clipped


def moved(state: AdapterState, sent: AdapterState) -> float:
    """Frobenius norm of s B A - s0 B0 A0 over all modules of `state` together, and of what full weights changed by since."""
    total = 0.0
    for name, adapter in state.modules.items():
        before = sent.modules[name]
        up_OR = torch.cat([adapter.up_OR.double() * adapter.scaling, before.up_OR.double() * -before.scaling], dim=1)
        total += squared_norm(up_OR, torch.cat([adapter.down_RI, before.down_RI]).double())
    for name, change in state.full_weights.items():
        pairs = zip(change.tensors, sent.full_weights[name].tensors, strict=True)
        total += sum(float((after.double() - before.double()).square().sum()) for after, before in pairs)
    return math.sqrt(total)


def outlier(spool: Spool) -> str | None:
    """The edge whose update is far larger than that in the middle of the round; None: there is none such."""
    sizes = {each.edge: largest_norm(each.state) for each in spool}
    edge = max(sizes, key=sizes.__getitem__, default=None)
    return edge if edge is not None and sizes[edge] > _FAR_LARGER * statistics.median_low(sizes.values()) else None


def _shrunk(state: AdapterState, sent: AdapterState, share: float) -> AdapterState:
    """What was sent, and this share of the change."""
    modules = {name: _between(sent.modules[name], adapter, share) for name, adapter in state.modules.items()}
    full_weights = {}
    for name, change in state.full_weights.items():
        pairs = zip(change.tensors, sent.full_weights[name].tensors, strict=True)
        full_weights[name] = change.of(tuple(before.double() + share * (after.double() - before.double()) for after, before in pairs))
    return AdapterState(state.kind, modules, full_weights)


def _between(before: ModuleAdapter, after: ModuleAdapter, share: float) -> ModuleAdapter:
    if not before.up_OR.any():
        return ModuleAdapter(after.down_RI, after.up_OR * share, after.scaling)
    # (1 - c) s0 B0 A0 + c s B A, as one pair of factors.
    kept_OR = before.up_OR.double() * ((1 - share) * before.scaling / after.scaling)
    up_OR = torch.cat([after.up_OR.double() * share, kept_OR], dim=1)
    return ModuleAdapter(torch.cat([after.down_RI, before.down_RI]).double(), up_OR, after.scaling)


def _in_blocks(
    rows: Callable[[str, int, int], Tensor], voters: Sequence[str], num_rows: int, row_numbers: int, robust: Robust
) -> Tensor:  # fmt: skip
    """Memory is edges x block, and the result."""
    cut, step = robust.num_cut(len(voters)), max(1, _BLOCK_NUMBERS // (len(voters) * row_numbers))
    blocks = []
    for start in range(0, num_rows, step):
        values_E = torch.stack([rows(edge, start, min(start + step, num_rows)) for edge in voters])
        blocks.append(values_E.sort(dim=0).values[cut : len(voters) - cut].mean(dim=0))
    return torch.cat(blocks)
