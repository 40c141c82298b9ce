"""The exact mean of products, cut to the common rank.

exact-svd  of module m, dW_m = sum_i p_i (alpha_i / r_i) B_i A_i, with p_i = w_i / sum of w_j over the edges j that trained m, and w_i the
           edge's rows or, with weigh = "steps", these times how often it does the steps that were asked for; then the best approximation of
           dW at the common rank. Source: FlexLoRA (Bai et al., 2024), with rows of A kept at edges' own length (decision 0002).
delta-svd  the same of W + sum_i p_i (W_i' - W_i): W is the common product, W_i what edge i was sent of it at its own rank, W_i' what came
           back. What an edge's rank cannot hold, it does not pull towards zero. Of equal ranks, in fp32, this is exact-svd.
"""

from __future__ import annotations

from atoll.adapters.low_rank import row_length
from atoll.adapters.state import ModuleAdapter
from atoll.federated.aggregation.rule import Merged, ModuleInRound, ModuleSum
from atoll.federated.aggregation.sums import ProductSum


class ExactSvd:
    """[federated] aggregation = "exact-svd"."""

    works_on_products = True
    averages_bottlenecks = True
    takes_robust_means = True
    sends_best_rank = True

    def begin(self, module: ModuleInRound) -> ModuleSum:
        """The sum of products."""
        return _Exact(module)


class DeltaSvd(ExactSvd):
    """[federated] aggregation = "delta-svd"."""

    takes_robust_means = False

    def begin(self, module: ModuleInRound) -> ModuleSum:
        """The sum of products, and what was sent."""
        return _Delta(module)


class _Exact:
    """A module that one edge alone trained, at the common rank, is taken over as it is, bit for bit."""

    def __init__(self, module: ModuleInRound) -> None:
        self.module, self.product = module, ProductSum(module.old.size)
        self._lengths: list[float] = []
        self._only: ModuleAdapter | None = None

    @property
    def num_held(self) -> int:
        """Numbers in memory."""
        return self.product.num_held

    def add(self, adapter: ModuleAdapter, weight: float, sent: ModuleAdapter) -> None:
        self._lengths.append(row_length(adapter.down_RI))
        self._only = adapter if len(self._lengths) == 1 else None
        self.product.add(adapter, weight)

    def finish(self) -> Merged:
        if self._only is not None and self.module.is_whole(self._only):
            return Merged(self._only)
        self.shift()
        return self.module.cut(self.product.mean_product(), self._lengths)

    def shift(self) -> None:
        """Nothing but the mean counts."""


class _Delta(_Exact):
    def __init__(self, module: ModuleInRound) -> None:
        super().__init__(module)
        self._sent: dict[int, tuple[ModuleAdapter, float]] = {}
        """By rank, with the weights of all edges of that rank: all of one rank are sent the same."""

    def add(self, adapter: ModuleAdapter, weight: float, sent: ModuleAdapter) -> None:
        super().add(adapter, weight, sent)
        self._sent[sent.rank] = sent, weight + self._sent.get(sent.rank, (sent, 0.0))[1]

    def shift(self) -> None:
        """By what the common product has over what edges were sent of it."""
        old = self.module.old
        for adapter, weight in self._sent.values():
            # Of a smaller rank, or rounded on its way.
            if any(one.shape != other.shape or not one.equal(other) for one, other in zip(adapter.tensors, old.tensors, strict=True)):
                self.product.shift(adapter, -weight)
                self.product.shift(old, weight)
