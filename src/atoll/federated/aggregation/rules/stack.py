"""The exact mean is kept as a frozen delta, and adapters start anew in every round.

Source: FLoRA (Wang et al., 2024).
"""

from __future__ import annotations

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import ModuleAdapter
from atoll.federated.aggregation.rule import Merged, ModuleInRound, ModuleSum, adapter_of
from atoll.federated.aggregation.sums import ProductSum
from atoll.seeding import stream


class Stack:
    """[federated] aggregation = "stack"."""

    works_on_products = True
    keeps_frozen_delta = True
    starts_anew = True

    def begin(self, module: ModuleInRound) -> ModuleSum:
        """The sum of products."""
        return _Stacked(module)


class _Stacked:
    def __init__(self, module: ModuleInRound) -> None:
        self._module, self._product = module, ProductSum(module.old.size)

    @property
    def num_held(self) -> int:
        """Numbers in memory."""
        return self._product.num_held

    def add(self, adapter: ModuleAdapter, weight: float, sent: ModuleAdapter) -> None:
        self._product.add(adapter, weight)

    def finish(self) -> Merged:
        module = self._module
        return Merged(new_adapter(module), adapter_of(self._product.mean(), module.scaling))


def new_adapter(module: ModuleInRound) -> ModuleAdapter:
    """A new adapter in the place of another; each round has rows of its own."""
    alpha, round_seed = module.old.scaling * module.old.rank, stream(module.seed, "stack", round=module.round)
    return fresh_adapters("lora", {module.name: module.old.size}, {module.name: module.rank}, alpha, round_seed).modules[module.name]
