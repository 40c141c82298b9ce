"""What edges send of one module, summed up as it comes. Memory does not grow with the number of edges.

Shape suffixes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.state import ModuleAdapter

Factors = tuple[Tensor, Tensor]
"""(up_OR, down_RI), fp64; they stand for their product."""
Product = Factors | Tensor
"""As factors, or dense (OI)."""


def dense_factors(product_OI: Tensor) -> Factors:
    """A dense product beside an identity."""
    num_outputs, num_inputs = product_OI.shape
    if num_inputs <= num_outputs:
        return product_OI, torch.eye(num_inputs, dtype=torch.float64)
    return torch.eye(num_outputs, dtype=torch.float64), product_OI


class ProductSum:
    """The weighted mean of s_i B_i A_i over edges, exact to the rounding of fp64.

    Adapters are kept as they came as long as together they hold fewer numbers than the product itself; later the sum is dense, and some are
    collected before they are added to it, because one product of long factors is far quicker than many of thin ones.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._parts: list[tuple[ModuleAdapter, float]] = []
        self._dense_OI: Tensor | None = None
        self._weight = 0.0

    @property
    def num_held(self) -> int:
        """Numbers in memory."""
        dense = 0 if self._dense_OI is None else self._dense_OI.numel()
        return dense + sum(adapter.num_parameters for adapter, _ in self._parts)

    def add(self, adapter: ModuleAdapter, weight: float) -> None:
        """Count one edge's adapter."""
        self._weight += weight
        self.shift(adapter, weight)

    def shift(self, adapter: ModuleAdapter, weight: float) -> None:
        """Add so much of an adapter to the sum, without counting it as one of those whose mean is taken."""
        self._parts.append((adapter, weight))
        num_inputs, num_outputs = self._size
        collected = sum(part.num_parameters for part, _ in self._parts)
        if self._dense_OI is None and len(self._parts) > 1 and collected > num_inputs * num_outputs:
            self._dense_OI = torch.zeros(num_outputs, num_inputs, dtype=torch.float64)
        if self._dense_OI is not None and collected > num_inputs * num_outputs // 4:
            self._flush()

    def _flush(self) -> None:
        """Add what is collected to the dense sum."""
        assert self._dense_OI is not None
        if self._parts:
            self._dense_OI.addmm_(*self._factors(1))
            self._parts.clear()

    def _factors(self, whole: float) -> Factors:
        """The concatenation [p_i s_i B_i], [A_i] of what is collected, p_i as shares of `whole`."""
        up_OR = torch.cat([part.up_OR.double() * (part.scaling * weight / whole) for part, weight in self._parts], dim=1)
        return up_OR, torch.cat([part.down_RI for part, _ in self._parts]).double()

    def mean(self) -> Factors:
        """Factors of the mean: the concatenation [p_i s_i B_i], [A_i], or the dense product beside an identity."""
        product = self.mean_product()
        return dense_factors(product) if isinstance(product, Tensor) else product

    def mean_product(self) -> Product:
        """The mean, dense where it is held so."""
        if self._dense_OI is None:
            return self._factors(self._weight)
        self._flush()
        return self._dense_OI / self._weight


class PaddedSum:
    """The weighted means of A_i and of (s_i / s) B_i apart, padded with zeros to one rank; s is the scaling of the result."""

    def __init__(self, size: tuple[int, int], rank: int, scaling: float) -> None:
        self._down_RI = torch.zeros(rank, size[0], dtype=torch.float64)
        self._up_OR = torch.zeros(size[1], rank, dtype=torch.float64)
        self._scaling, self._weight, self._reached = scaling, 0.0, 0

    def add(self, adapter: ModuleAdapter, weight: float) -> None:
        """Count one edge's adapter, of the result's rank or less."""
        rank = adapter.rank
        self._weight += weight
        self._reached = max(self._reached, rank)
        self._down_RI[:rank] += weight * adapter.down_RI.double()
        self._up_OR[:, :rank] += (weight * (adapter.scaling / self._scaling)) * adapter.up_OR.double()

    def mean(self, spare: Callable[[int], Tensor]) -> ModuleAdapter:
        """The two means. Rows of A that no edge has come from `spare(first)`: beside zeros in B they change nothing, and can be trained."""
        down_RI = torch.cat([self._down_RI[: self._reached] / self._weight, spare(self._reached).double()])
        return ModuleAdapter(down_RI.float(), (self._up_OR / self._weight).float(), self._scaling)


class FullWeightSum:
    """The weighted mean of what a module's weight (and bias) was changed by, in fp64; of one edge alone, its own bits."""

    def __init__(self, like: FullWeightDelta) -> None:
        self._sums = tuple(torch.zeros(tensor.shape, dtype=torch.float64) for tensor in like.tensors)
        self._weight = 0.0

    @property
    def num_held(self) -> int:
        """Numbers in memory."""
        return sum(tensor.numel() for tensor in self._sums)

    def add(self, change: FullWeightDelta, weight: float) -> None:
        """Count one edge's change."""
        self._weight += weight
        for total, tensor in zip(self._sums, change.tensors, strict=True):
            total.add_(tensor.double(), alpha=weight)

    def mean(self) -> FullWeightDelta:
        """What was added, over its weights."""
        return FullWeightDelta(*((total / self._weight).float() for total in self._sums))
