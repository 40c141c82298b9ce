"""Updates of unequal rank and partial weights become one, by one of five rules. All but the second start from the exact mean of module m,

dW_m = sum_i p_i (alpha_i / r_i) B_i A_i, with p_i = w_i / sum of w_j over the edges j that trained m, and w_i
the edge's rows or, with weigh = "steps", these times how often it does the steps that were asked for.

exact-svd  the best approximation of dW at the common rank.
delta-svd  the same of W + sum_i p_i (W_i' - W_i): W is the common product, W_i what edge i was sent of it at its own rank, W_i' what came
           back. What an edge's rank cannot hold, it does not pull towards zero. Of equal ranks, in fp32, this is exact-svd.
zero-pad   A and B averaged apart, padded with zeros to the common rank: not dW. Source: HetLoRA (Cho et al., 2024), weighted by
           data, and without pruning.
residual   as zero-pad, and what that misses of dW is kept as a frozen delta. Source: FedEx-LoRA (Singhal et al., 2025).
stack      dW is kept as a frozen delta, and adapters start anew in every round. Source: FLoRA (Wang et al., 2024).

Of a weight that is trained whole, dW itself travels, and by each of the rules the exact mean is what comes out. With exact-svd, `robust`
can put the median or the trimmed mean in the mean's place.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.low_rank import leading_factors, row_length, singular_factors, squared_norm
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.config.conflicts import KEEPS_FROZEN_DELTA
from atoll.errors import AdapterFitError
from atoll.federated.aggregation.parts import Aggregation, at_rank, spare_rows, unequal_widths
from atoll.federated.aggregation.robust import MEAN, Clipped, Robust, clip_updates, combined_full_weights, combined_product
from atoll.federated.aggregation.spool import Contribution, Spool
from atoll.federated.aggregation.sums import Factors, FullWeightSum, PaddedSum, Product, ProductSum
from atoll.seeding import stream


@dataclass(frozen=True, slots=True, eq=False)
class Common:
    """What the edges share: an adapter that they train, and the frozen delta."""

    trained: AdapterState
    frozen_delta: AdapterState | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """What a round came to."""

    common: Common
    discarded_share: float
    """Squared Frobenius norm of what the result misses of the exact mean, over that of the exact mean."""
    clipped: Sequence[Clipped] = ()
    """Updates that were shrunk before."""


def started(state: AdapterState, aggregation: Aggregation, seed: int) -> Common:
    """What the first round begins with: where adapters always start anew, what `state` has learned becomes the frozen delta."""
    if aggregation != "stack" or not any(adapter.up_OR.any() for adapter in state.modules.values()):
        return Common(state)
    anew = {name: _anew(name, one, one.rank, seed, 0) for name, one in state.modules.items()}
    return Common(AdapterState(state.kind, anew, state.full_weights), AdapterState(state.kind, state.modules))


def joined(common: Common) -> AdapterState:
    """The two parts as one adapter that makes the same change. Ranks add up, and stop at min(inputs, outputs)."""
    trained, frozen_delta = common.trained, common.frozen_delta
    if frozen_delta is None:
        return trained
    # A start that was not trained yet would add columns of zeros.
    modules = {name: one for name, one in trained.modules.items() if name not in frozen_delta.modules or one.up_OR.any()}
    whole = (AdapterState(trained.kind, modules) + frozen_delta).compacted()
    order = dict.fromkeys([*trained.modules, *frozen_delta.modules])
    return AdapterState(trained.kind, {name: whole.modules[name] for name in order}, trained.full_weights)


def aggregate(
    spool: Spool, aggregation: Aggregation, common: Common, ranks: Mapping[str, int], sent: Callable[[str], AdapterState], *,
    robust: Robust = MEAN, seed: int = 0, round: int = 1,
) -> Aggregate:  # fmt: skip
    """One round's updates become one, the same bits in whatever order they came; `sent` is what an edge was given, by its name.

    Raises: AdapterFitError where `robust` needs products, and the rule or the adapters have none.
    """
    robust.check(aggregation, common.trained)
    clipped = [] if robust.clip is None else clip_updates(spool, robust.clip, sent)
    aggregator = Aggregator(aggregation, common, ranks, seed=seed, round=round)
    if robust.combine != "mean":
        return replace(_combined(spool, common, ranks, robust), clipped=clipped)
    for contribution in spool:
        aggregator.add(contribution, sent(contribution.edge))
    return replace(aggregator.finish(), clipped=clipped)


class Aggregator:
    """One round's updates, added one after the other in an order that is always the same; what it holds does not grow with their number.

    A module that one edge alone trained, at the common rank, is taken over as it is, bit for bit (but by `stack`). A module that nobody
    trained stays as it was.
    """

    def __init__(self, aggregation: Aggregation, common: Common, ranks: Mapping[str, int], *, seed: int = 0, round: int = 1) -> None:
        if common.trained.kind == "bottleneck" and aggregation in KEEPS_FROZEN_DELTA:
            raise AdapterFitError(
                "bottleneck adapters have no product that could be kept as a frozen delta", got=f'aggregation = "{aggregation}"',
                expected='"exact-svd" or "zero-pad", which average them the same way', do="choose one of them",
            )  # fmt: skip
        self._aggregation, self._common, self._ranks, self._seed, self._round = aggregation, common, ranks, seed, round
        self._sums: dict[str, _Sums] = {}
        self._whole: dict[str, FullWeightSum] = {}

    @property
    def num_held(self) -> int:
        """Numbers in memory of what was added."""
        products = sum(sums.product.num_held for sums in self._sums.values() if sums.product is not None)
        return products + sum(total.num_held for total in self._whole.values())

    def add(self, contribution: Contribution, sent: AdapterState) -> None:
        """Count one edge's update, which `check_update` has accepted, of what it was `sent`."""
        modules = contribution.state.modules
        for name, adapter in modules.items():
            if self._common.trained.kind == "bottleneck" and adapter.rank != self._ranks[name]:
                raise unequal_widths(adapter.rank, self._ranks[name])
        for name, adapter in modules.items():
            if name not in self._sums:
                self._sums[name] = self._new_sums(name)
            self._sums[name].add(adapter, contribution.weight)
            if self._aggregation == "delta-svd":
                self._sums[name].add_sent(sent.modules[name], contribution.weight)
        for name, change in contribution.state.full_weights.items():
            if name not in self._whole:
                self._whole[name] = FullWeightSum(change)
            self._whole[name].add(change, contribution.weight)

    def finish(self) -> Aggregate:
        """The new common adapter, and what it misses."""
        parts = {name: self._part(name, sums) for name, sums in self._sums.items()}
        return _joined_parts(self._common, parts, {name: total.mean() for name, total in self._whole.items()})

    def _new_sums(self, name: str) -> _Sums:
        size, bottleneck = self._common.trained.modules[name].size, self._common.trained.kind == "bottleneck"
        pads = bottleneck or self._aggregation in ("zero-pad", "residual")
        padded = PaddedSum(size, self._ranks[name], _scaling(self._common.trained.modules[name], self._ranks[name])) if pads else None
        return _Sums(None if bottleneck else ProductSum(size), padded)

    def _part(self, name: str, sums: _Sums) -> _Part:
        old, rank = self._common.trained.modules[name], self._ranks[name]
        if self._aggregation == "stack":
            assert sums.product is not None
            return _Part(_anew(name, old, rank, self._seed, self._round), _adapter_of(sums.product.mean(), _scaling(old, rank)))
        if sums.only is not None and _fits_alone(sums.only, old, rank):
            return _Part(sums.only)
        if sums.padded is not None:
            padded = sums.padded.mean(lambda first: spare_rows(old, first, rank))
            return _padded(padded, sums.product, keeps_rest=self._aggregation == "residual")
        assert sums.product is not None
        for adapter, weight in sums.sent.values():
            # Of a smaller rank, or rounded on its way.
            if any(one.shape != other.shape or not one.equal(other) for one, other in zip(adapter.tensors, old.tensors, strict=True)):
                sums.product.shift(adapter, -weight)
                sums.product.shift(old, weight)
        return _cut(sums.product.mean_product(), old, rank, sums.lengths)


@dataclass(slots=True, eq=False)
class _Sums:
    """What came of one module so far."""

    product: ProductSum | None
    padded: PaddedSum | None
    only: ModuleAdapter | None = None
    """While one edge alone sent it."""
    lengths: list[float] = field(default_factory=list)
    """Of the rows of every edge's A."""
    sent: dict[int, tuple[ModuleAdapter, float]] = field(default_factory=dict)
    """By rank, with the weights of all edges of that rank."""

    def add_sent(self, adapter: ModuleAdapter, weight: float) -> None:
        """Count what one edge was sent; all of one rank are sent the same."""
        self.sent[adapter.rank] = adapter, weight + self.sent.get(adapter.rank, (adapter, 0.0))[1]

    def add(self, adapter: ModuleAdapter, weight: float) -> None:
        self.lengths.append(row_length(adapter.down_RI))
        self.only = adapter if len(self.lengths) == 1 else None
        if self.product is not None:
            self.product.add(adapter, weight)
        if self.padded is not None:
            self.padded.add(adapter, weight)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A module after a round: the new adapter, what is added to the frozen delta, squared norms of what is missed and of the exact mean."""

    trained: ModuleAdapter
    frozen_delta: ModuleAdapter | None = None
    missed: float = 0.0
    whole: float = 0.0


def _combined(spool: Spool, common: Common, ranks: Mapping[str, int], robust: Robust) -> Aggregate:
    """The median or trimmed mean, one module in memory at a time."""
    parts, changes = dict[str, _Part](), dict[str, FullWeightDelta]()
    for name, voters in spool.voters().items():
        if name in common.trained.full_weights:
            changes[name] = combined_full_weights(spool, name, voters, common.trained.full_weights[name], robust)
            continue
        old, rank = common.trained.modules[name], ranks[name]
        alone = spool.adapter(voters[0], name) if len(voters) == 1 else None
        if alone is not None and _fits_alone(alone, old, rank):
            parts[name] = _Part(alone)
        else:
            lengths = [row_length(spool.adapter(voter, name).down_RI) for voter in voters]
            parts[name] = _cut(combined_product(spool, name, voters, old.size, robust), old, rank, lengths)
    return _joined_parts(common, parts, changes)


def _joined_parts(common: Common, parts: Mapping[str, _Part], changes: Mapping[str, FullWeightDelta]) -> Aggregate:
    trained = {**common.trained.modules, **{name: part.trained for name, part in parts.items()}}
    added = {name: part.frozen_delta for name, part in parts.items() if part.frozen_delta is not None}
    frozen_delta = common.frozen_delta
    if added:
        frozen_delta = (AdapterState("lora", frozen_delta.modules if frozen_delta else {}) + AdapterState("lora", added)).compacted()
    missed, whole = sum(part.missed for part in parts.values()), sum(part.whole for part in parts.values())
    state = AdapterState(common.trained.kind, trained, {**common.trained.full_weights, **changes})
    return Aggregate(Common(state, frozen_delta), missed / whole if whole else 0.0)


def _cut(product: Product, old: ModuleAdapter, rank: int, lengths: Sequence[float]) -> _Part:
    """The best approximation of the product at this rank, with rows of A as long as those of edges' own, whose `lengths` these are.

    At the old length B alone would grow, and with it what a step's noise in A comes to: training falls apart at high rates. The median,
    because an edge may share a product between A and B in whatever way it likes; beside one other edge the old length has a vote as well.
    """
    up_OR, down_RI = (product, None) if isinstance(product, torch.Tensor) else product
    found, voting = leading_factors(up_OR, down_RI, rank), [length for length in lengths if length]
    if len(voting) in (0, 2):
        voting.append(row_length(old.down_RI))
    new = at_rank(found.factors, rank, old, _scaling(old, rank), statistics.median(voting))
    return _Part(new, missed=found.missed, whole=found.whole)


def _fits_alone(adapter: ModuleAdapter, old: ModuleAdapter, rank: int) -> bool:
    # An update of a smaller rank that was clipped may have the common rank, but it keeps its own scaling.
    return adapter.rank == rank and math.isclose(adapter.scaling, _scaling(old, rank))


def _scaling(old: ModuleAdapter, rank: int) -> float:
    return old.scaling * old.rank / rank


def _padded(trained: ModuleAdapter, product: ProductSum | None, *, keeps_rest: bool) -> _Part:
    """The padded mean as it is stored, beside what it misses of the exact one."""
    if product is None:
        return _Part(trained)
    up_OR, down_RI = product.mean()
    rest = torch.cat([up_OR, trained.up_OR.double() * -trained.scaling], dim=1), torch.cat([down_RI, trained.down_RI.double()])
    whole = squared_norm(up_OR, down_RI)
    if not keeps_rest:
        return _Part(trained, missed=squared_norm(*rest), whole=whole)
    factors = singular_factors(*rest)
    # Less than the rounding of the padded mean itself is not worth a column.
    rank = int((factors.values_R > whole**0.5 * torch.finfo(torch.float32).eps / 2).sum())
    kept = factors.up_OR[:, :rank] * factors.values_R[:rank], factors.down_RI[:rank]
    return _Part(trained, _adapter_of(kept, trained.scaling) if rank else None, whole=whole)


def _adapter_of(factors: Factors, scaling: float) -> ModuleAdapter:
    up_OR, down_RI = factors
    return ModuleAdapter(down_RI.float().contiguous(), (up_OR / scaling).float().contiguous(), scaling)


def _anew(name: str, old: ModuleAdapter, rank: int, seed: int, round: int) -> ModuleAdapter:
    """A new adapter in the place of another; each round has rows of its own."""
    alpha, round_seed = old.scaling * old.rank, stream(seed, "stack", round=round)
    return fresh_adapters("lora", {name: old.size}, {name: rank}, alpha, round_seed).modules[name]
