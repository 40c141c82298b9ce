"""The part of the common adapter that an edge trains: its modules, at its ranks.

Shape suffixes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from atoll.adapters.low_rank import SingularFactors, aligned, row_length, singular_factors
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AdapterFitError
from atoll.registry.parts import trait
from atoll.seeding import stream

Precision = Literal["fp32", "fp16"]
"""[federated] precision."""
LARGEST_FP16 = torch.finfo(torch.float16).max


class EdgeParts:
    """Parts of one common adapter. Each module is made once for each rank, however many edges have it."""

    def __init__(self, state: AdapterState, aggregation: str, precision: Precision = "fp32") -> None:
        self._state, self._precision = state, precision
        self._by_svd = trait("aggregation", aggregation, "sends_best_rank")
        self._whole = {name: change.of(tuple(map(self._sent, change.tensors))) for name, change in state.full_weights.items()}
        self._made: dict[tuple[str, int], ModuleAdapter] = {}

    def of(self, ranks: Mapping[str, int]) -> AdapterState:
        """The modules that `ranks` names, scaled by the run's alpha over the edge's rank, and all full weights.

        By a rule that sends the best rank, the best approximation of each; otherwise the first rows of A and columns of B; in fp32, rounded
        to what travels, so that both sides know the same numbers.

        Raises: AdapterFitError for a bottleneck adapter at another width.
        """
        state = self._state
        modules = {name: self._module(name, rank) for name, rank in ranks.items() if name not in state.full_weights}
        return AdapterState(state.kind, modules, self._whole)

    def _module(self, name: str, rank: int) -> ModuleAdapter:
        if (name, rank) not in self._made:
            adapter = self._state.modules[name]
            made = adapter if rank == adapter.rank else self._at(adapter, rank)
            self._made[name, rank] = ModuleAdapter(self._sent(made.down_RI), self._sent(made.up_OR), made.scaling)
        return self._made[name, rank]

    def _sent(self, tensor: Tensor) -> Tensor:
        # An infinity in one place would end every edge's training.
        return tensor.clamp(-LARGEST_FP16, LARGEST_FP16).half().float() if self._precision == "fp16" else tensor

    def _at(self, adapter: ModuleAdapter, rank: int) -> ModuleAdapter:
        if self._state.kind == "bottleneck":
            raise unequal_widths(rank, adapter.rank)
        if not self._by_svd:
            return first_rows(adapter, rank)
        factors = singular_factors(adapter.up_OR * adapter.scaling, adapter.down_RI)
        return at_rank(factors, rank, adapter, adapter.scaling * adapter.rank / rank, row_length(adapter.down_RI))


def at_rank(factors: SingularFactors, rank: int, reference: ModuleAdapter, scaling: float, length: float) -> ModuleAdapter:
    """The best approximation of this rank, turned to the reference, its rows in A of this length.

    Where the product's own rank is less, there are zeros in B beside rows that go on as they were.
    """
    up, down = aligned(factors, reference.down_RI, rank, length)
    missing = rank - down.shape[0]
    if missing > 0:
        spare = reference.down_RI[-missing:] if reference.rank >= rank else _new_rows(missing, reference)
        up, down = torch.cat([up, up.new_zeros(up.shape[0], missing)], dim=1), torch.cat([down, spare.double()])
    return ModuleAdapter(down.float().contiguous(), (up / scaling).float().contiguous(), scaling)


def first_rows(adapter: ModuleAdapter, rank: int) -> ModuleAdapter:
    """The first rows of A and columns of B, standing for the same product under the scaling alpha / rank; zeros in B beyond the last."""
    up_OR = adapter.up_OR[:, :rank] * (rank / adapter.rank)
    missing = max(0, rank - adapter.rank)
    up_OR = torch.cat([up_OR, up_OR.new_zeros(up_OR.shape[0], missing)], dim=1)
    down_RI = torch.cat([adapter.down_RI[:rank], _new_rows(missing, adapter)])
    return ModuleAdapter(down_RI, up_OR, adapter.scaling * adapter.rank / rank)


def wider(adapter: ModuleAdapter, rank: int) -> ModuleAdapter:
    """The same function at this rank or, where it has that already, the adapter itself: new rows in A, and zeros beside them in B."""
    return adapter if rank <= adapter.rank else first_rows(adapter, rank)


def spare_rows(reference: ModuleAdapter, first: int, rank: int) -> Tensor:
    """Rows of A from number `first` up to the rank: the reference's own, or new ones where its rank is smaller."""
    return reference.down_RI[first:rank] if reference.rank >= rank else _new_rows(rank - first, reference)


def unequal_widths(got: int, expected: int) -> AdapterFitError:
    """The error of bottleneck adapters that cannot be averaged: a relu between the matrices leaves no product, and no smaller width."""
    return AdapterFitError(
        "bottleneck adapters of unequal width cannot be averaged", got=f"width {got}", expected=f"width {expected}",
        do="give every edge the same rank",
    )  # fmt: skip


def _new_rows(number: int, like: ModuleAdapter) -> Tensor:
    # As in a new adapter. Zeros beside the zeros in B would have no gradient, and stay what they are for good.
    num_inputs = like.size[0]
    generator = torch.Generator().manual_seed(stream(0, "spare rows", round=like.rank))
    return (torch.rand(number, num_inputs, generator=generator) * 2 - 1) / num_inputs**0.5
