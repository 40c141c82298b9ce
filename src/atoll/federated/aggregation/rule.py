"""The seam of aggregation: a rule makes one adapter of what edges send of a module, one edge after the other.

Shape suffixes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from atoll.adapters.low_rank import leading_factors, row_length
from atoll.adapters.state import Kind, ModuleAdapter
from atoll.federated.aggregation.edge_parts import at_rank
from atoll.federated.aggregation.sums import Factors, Product


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """What a round made of one module: its new adapter, what is added to the frozen delta, what is missed of the exact mean, and that.

    Units: missed and exact are squared Frobenius norms, of which the run's discarded share is made.
    """

    trained: ModuleAdapter
    frozen_delta: ModuleAdapter | None = None
    missed: float = 0.0
    exact: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ModuleInRound:
    """One module as a rule finds it, and the ways from a product back to an adapter."""

    name: str
    kind: Kind
    old: ModuleAdapter
    """Of the common adapter, before the round."""
    rank: int
    """Of the common adapter, after it."""
    seed: int
    round: int

    @property
    def scaling(self) -> float:
        """Of an adapter of the common rank: the run's alpha over it."""
        return self.old.scaling * self.old.rank / self.rank

    def is_whole(self, adapter: ModuleAdapter) -> bool:
        """Whether an edge's adapter can stand for the common one as it is."""
        # An update of a smaller rank that was clipped may have the common rank, but it keeps its own scaling.
        return adapter.rank == self.rank and math.isclose(adapter.scaling, self.scaling)

    def cut(self, product: Product, lengths: Sequence[float]) -> Merged:
        """The best approximation of a product at the common rank, with rows of A as long as those of edges' own, whose `lengths` these are.

        At the old length B alone would grow, and with it what a step's noise in A comes to: training falls apart at high rates. The median,
        because an edge may share a product between A and B in whatever way it likes; beside one other edge the old length has a vote, too.
        """
        up_OR, down_RI = (product, None) if isinstance(product, torch.Tensor) else product
        found, voting = leading_factors(up_OR, down_RI, self.rank), [length for length in lengths if length]
        if len(voting) in (0, 2):
            voting.append(row_length(self.old.down_RI))
        new = at_rank(found.factors, self.rank, self.old, self.scaling, statistics.median(voting))
        return Merged(new, missed=found.missed, exact=found.whole)


class ModuleSum(Protocol):
    """What came of one module so far. What it holds must not grow with the number of edges."""

    def add(self, adapter: ModuleAdapter, weight: float, sent: ModuleAdapter) -> None:
        """Count an edge's adapter, of the common rank or less, which was `sent` as this one. Edges come in the order of their names.

        Raises: AdapterFitError for one that this rule cannot count.
        """

    def finish(self) -> Merged:
        """What comes of all that were added, of which there is at least one."""


class AggregationRule(Protocol):
    """A rule, made anew for every round. What an edge's numbers come to depends on the round's updates alone.

    Its class may say: `keeps_frozen_delta` (edges are sent a part that they evaluate and do not train), `starts_anew` (adapters begin from
    zero in every round, so that no optimizer state lives on), `works_on_products` (updates may be clipped, as changes of products),
    `takes_robust_means` (the median or trimmed mean of products may stand in its place), `sends_best_rank` (an edge of smaller rank is sent
    the best approximation, not the first rows), `averages_bottlenecks` (it also does with adapters that have no product), `pads` (A and B
    are averaged apart: a frozen delta holds no more than that misses).
    """

    def begin(self, module: ModuleInRound) -> ModuleSum:
        """An empty sum for one module."""


def adapter_of(factors: Factors, scaling: float) -> ModuleAdapter:
    """The adapter that stands for a product."""
    up_OR, down_RI = factors
    return ModuleAdapter(down_RI.float().contiguous(), (up_OR / scaling).float().contiguous(), scaling)
