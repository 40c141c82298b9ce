"""A and B averaged apart, padded with zeros to the common rank: not the mean of products.

Source: HetLoRA (Cho et al., 2024), weighted by data, and without pruning.
"""

from __future__ import annotations

import torch

from atoll.adapters.low_rank import squared_norm
from atoll.adapters.state import ModuleAdapter
from atoll.federated.aggregation.edge_parts import spare_rows, unequal_widths
from atoll.federated.aggregation.rule import Merged, ModuleInRound, ModuleSum
from atoll.federated.aggregation.sums import Factors, PaddedSum, ProductSum


class ZeroPad:
    """[federated] aggregation = "zero-pad"; and what every rule comes to for bottleneck adapters, which have no product."""

    averages_bottlenecks = True
    pads = True

    def begin(self, module: ModuleInRound) -> ModuleSum:
        """The two sums."""
        return PaddedModule(module)


class PaddedModule:
    """A module that one edge alone trained, at the common rank, is taken over as it is, bit for bit."""

    def __init__(self, module: ModuleInRound) -> None:
        self.module = module
        self._padded = PaddedSum(module.old.size, module.rank, module.scaling)
        self._product = None if module.kind == "bottleneck" else ProductSum(module.old.size)
        self._only: ModuleAdapter | None = None
        self._num_edges = 0

    @property
    def num_held(self) -> int:
        """Numbers in memory, but for the two sums, which are as large as the adapter."""
        return 0 if self._product is None else self._product.num_held

    def add(self, adapter: ModuleAdapter, weight: float, sent: ModuleAdapter) -> None:
        """Count an edge's adapter.

        Raises: AdapterFitError for a bottleneck of another width.
        """
        if self.module.kind == "bottleneck" and adapter.rank != self.module.rank:
            raise unequal_widths(adapter.rank, self.module.rank)
        self._num_edges += 1
        self._only = adapter if self._num_edges == 1 else None
        self._padded.add(adapter, weight)
        if self._product is not None:
            self._product.add(adapter, weight)

    def finish(self) -> Merged:
        """The padded mean as it is stored, beside what it misses of the exact one."""
        module = self.module
        if self._only is not None and module.is_whole(self._only):
            return Merged(self._only)
        trained = self._padded.mean(lambda first: spare_rows(module.old, first, module.rank))
        if self._product is None:
            return Merged(trained)
        up_OR, down_RI = self._product.mean()
        rest = torch.cat([up_OR, trained.up_OR.double() * -trained.scaling], dim=1), torch.cat([down_RI, trained.down_RI.double()])
        return self.with_rest(trained, rest, squared_norm(up_OR, down_RI))

    def with_rest(self, trained: ModuleAdapter, rest: Factors, exact: float) -> Merged:
        """What is missed is lost."""
        return Merged(trained, missed=squared_norm(*rest), exact=exact)
