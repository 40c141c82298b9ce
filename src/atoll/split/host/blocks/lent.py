"""Adapters that a device lends to its session for one optimizer step: trained where the activations are, and forgotten with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atoll.adapters.layers import LowRankPair, adapted
from atoll.adapters.state import Kind
from atoll.split.host.blocks.middle import place_of


@dataclass(frozen=True, slots=True)
class LentModule:
    """A module whose adapter is lent, as Hello describes it."""

    name: str
    size: tuple[int, int]
    """Inputs and outputs."""
    rank: int
    scaling: float


class LentAdapters:
    """Pairs in a session's view of the base, in the order in which they travel; between two steps they hold no numbers."""

    def __init__(self, view: nn.Module, kind: Kind, modules: Sequence[LentModule], dropout: float) -> None:
        self._modules = modules
        self.pairs: dict[str, LowRankPair] = {}
        """By module, as they hang beside the base's modules."""
        for module in modules:
            base = view.get_submodule(module.name)
            down_RI, up_OR = (nn.Parameter(torch.empty(0, device=place_of(base))) for _ in range(2))
            layer = adapted(base, LowRankPair(kind, down_RI, up_OR, module.scaling, dropout))
            view.set_submodule(module.name, layer)
            self.pairs[module.name] = layer

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the factors: of each module down (R x I), then up (O x R)."""
        return [shape for one in self._modules for shape in ((one.rank, one.size[0]), (one.size[1], one.rank))]

    def take(self, factors: Sequence[Tensor]) -> None:
        """Begin with these factors; gradients begin anew."""
        for matrix, factor in zip(self._matrices, factors, strict=True):
            matrix.data, matrix.grad = factor.to(matrix.device), None

    def train(self, on: bool) -> None:
        """Whether the next pass is a training pass, in which some of what enters is dropped."""
        for layer in self.pairs.values():
            layer.training = on

    def give_back(self) -> list[Tensor]:
        """The factors' gradients, summed since they came; both are forgotten."""
        grads = [torch.zeros_like(matrix) if matrix.grad is None else matrix.grad for matrix in self._matrices]
        self.forget()
        return grads

    def forget(self) -> None:
        """Hold no numbers."""
        for matrix in self._matrices:
            matrix.data, matrix.grad = torch.empty(0, device=matrix.device), None

    @property
    def _matrices(self) -> list[nn.Parameter]:
        return [matrix for layer in self.pairs.values() for matrix in (layer.down_RI, layer.up_OR)]
