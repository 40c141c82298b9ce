"""Updates of unequal rank and partial weights become one, by one of four rules. All of them start from the exact mean of module m,

dW_m = sum_i p_i (alpha_i / r_i) B_i A_i, with p_i = |D_i| / sum of |D_j| over the edges j that trained m.

exact-svd  the best approximation of dW at the common rank.
zero-pad   A and B averaged apart, padded with zeros to the common rank: not dW. Source: HetLoRA (Cho et al., 2024), weighted by
           data, and without pruning.
residual   as zero-pad, and what that misses of dW is kept frozen beneath. Source: FedEx-LoRA (Singhal et al., 2025).
stack      dW is kept frozen beneath, and adapters start anew in every round. Source: FLoRA (Wang et al., 2024).

Of a weight that is trained whole, dW itself travels, and by each of the rules the exact mean is what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.low_rank import singular_factors
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.config.conflicts import KEEPS_BENEATH
from atoll.engines.federated.parts import Aggregation, at_rank, spare_rows, unequal_widths
from atoll.engines.federated.sums import Factors, PaddedSum, ProductSum, WholeSum
from atoll.errors import AdapterFitError, UpdateRefusedError
from atoll.seeding import stream


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """What one edge sends: its adapter, and the weight of its data."""

    edge: str
    state: AdapterState
    num_examples: int


@dataclass(frozen=True, slots=True, eq=False)
class Common:
    """What the edges share: an adapter that they train, and one that is frozen beneath it."""

    trained: AdapterState
    beneath: AdapterState | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """What a round came to."""

    common: Common
    discarded_share: float
    """Squared Frobenius norm of what the result misses of the exact mean, over that of the exact mean."""


def started(state: AdapterState, aggregation: Aggregation, seed: int) -> Common:
    """What the first round begins with: where adapters always start anew, what `state` has learned goes beneath."""
    if aggregation != "stack" or not any(adapter.up_OR.any() for adapter in state.modules.values()):
        return Common(state)
    anew = {name: _anew(name, one, one.rank, seed, 0) for name, one in state.modules.items()}
    return Common(AdapterState(state.kind, anew, state.whole), AdapterState(state.kind, state.modules))


def joined(common: Common) -> AdapterState:
    """The two parts as one adapter that makes the same change. Ranks add up, and stop at min(inputs, outputs)."""
    trained, beneath = common.trained, common.beneath
    if beneath is None:
        return trained
    # A start that was not trained yet would add columns of zeros.
    modules = {name: one for name, one in trained.modules.items() if name not in beneath.modules or one.up_OR.any()}
    whole = (AdapterState(trained.kind, modules) + beneath).compacted()
    order = dict.fromkeys([*trained.modules, *beneath.modules])
    return AdapterState(trained.kind, {name: whole.modules[name] for name in order}, trained.whole)


class Aggregator:
    """One round's updates, added as they come; what it holds does not grow with their number.

    A module that one edge alone trained, at the common rank, is taken over as it is, bit for bit (but by `stack`). A module that nobody
    trained stays as it was. The order of the updates does not matter beyond the last bits, and where they are few (see ProductSum) and the
    rule is exact-svd or stack, in no bit.
    """

    def __init__(self, aggregation: Aggregation, common: Common, ranks: Mapping[str, int], *, seed: int = 0, round: int = 1) -> None:
        if common.trained.kind == "bottleneck" and aggregation in KEEPS_BENEATH:
            raise AdapterFitError(
                "bottleneck adapters have no product that could be kept beneath", got=f'aggregation = "{aggregation}"',
                expected='"exact-svd" or "zero-pad", which average them the same way', do="choose one of them",
            )  # fmt: skip
        self._aggregation, self._common, self._ranks, self._seed, self._round = aggregation, common, ranks, seed, round
        self._sums: dict[str, _Sums] = {}
        self._whole: dict[str, WholeSum] = {}

    @property
    def num_held(self) -> int:
        """Numbers in memory of what was added."""
        products = sum(sums.product.num_held for sums in self._sums.values() if sums.product is not None)
        return products + sum(total.num_held for total in self._whole.values())

    def add(self, contribution: Contribution) -> None:
        """Count one edge's update, which `check_update` has accepted."""
        modules = contribution.state.modules
        for name, adapter in modules.items():
            if self._common.trained.kind == "bottleneck" and adapter.rank != self._ranks[name]:
                raise unequal_widths(adapter.rank, self._ranks[name])
        for name, adapter in modules.items():
            if name not in self._sums:
                self._sums[name] = self._new_sums(name)
            self._sums[name].add(contribution.edge, adapter, contribution.num_examples)
        for name, change in contribution.state.whole.items():
            if name not in self._whole:
                self._whole[name] = WholeSum(change)
            self._whole[name].add(change, contribution.num_examples)

    def finish(self) -> Aggregate:
        """The new common adapter, and what it misses."""
        common = self._common
        trained, added = dict(common.trained.modules), dict[str, ModuleAdapter]()
        missed = whole = 0.0
        for name, sums in self._sums.items():
            part = self._part(name, sums)
            trained[name] = part.trained
            missed, whole = missed + part.missed, whole + part.whole
            if part.beneath is not None:
                added[name] = part.beneath
        beneath = common.beneath
        if added:
            beneath = (AdapterState("lora", beneath.modules if beneath else {}) + AdapterState("lora", added)).compacted()
        means = {**common.trained.whole, **{name: total.mean() for name, total in self._whole.items()}}
        return Aggregate(Common(AdapterState(common.trained.kind, trained, means), beneath), missed / whole if whole else 0.0)

    def _new_sums(self, name: str) -> _Sums:
        size, bottleneck = self._common.trained.modules[name].size, self._common.trained.kind == "bottleneck"
        pads = bottleneck or self._aggregation in ("zero-pad", "residual")
        padded = PaddedSum(size, self._ranks[name], self._scaling(name)) if pads else None
        return _Sums(None if bottleneck else ProductSum(size), padded)

    def _scaling(self, name: str) -> float:
        old = self._common.trained.modules[name]
        return old.scaling * old.rank / self._ranks[name]

    def _part(self, name: str, sums: _Sums) -> _Part:
        old, rank = self._common.trained.modules[name], self._ranks[name]
        if self._aggregation == "stack":
            assert sums.product is not None
            return _Part(_anew(name, old, rank, self._seed, self._round), _adapter_of(sums.product.mean(), self._scaling(name)))
        if sums.only is not None and sums.only.rank == rank:
            return _Part(sums.only)
        if sums.padded is not None:
            padded = sums.padded.mean(lambda first: spare_rows(old, first, rank))
            return _padded(padded, sums.product, keeps_rest=self._aggregation == "residual")
        assert sums.product is not None
        factors = singular_factors(*sums.product.mean())
        squares_R = factors.values_R.square()
        trained = at_rank(factors, rank, old, self._scaling(name))
        return _Part(trained, missed=float(squares_R[rank:].sum()), whole=float(squares_R.sum()))


@dataclass(slots=True, eq=False)
class _Sums:
    """What came of one module so far."""

    product: ProductSum | None
    padded: PaddedSum | None
    only: ModuleAdapter | None = None
    """While one edge alone sent it."""
    num_edges: int = 0

    def add(self, edge: str, adapter: ModuleAdapter, weight: int) -> None:
        self.num_edges += 1
        self.only = adapter if self.num_edges == 1 else None
        if self.product is not None:
            self.product.add(edge, adapter, weight)
        if self.padded is not None:
            self.padded.add(adapter, weight)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What a round made of one module: the new adapter, what is added beneath, squared norms of what is missed and of the exact mean."""

    trained: ModuleAdapter
    beneath: ModuleAdapter | None = None
    missed: float = 0.0
    whole: float = 0.0


def _padded(trained: ModuleAdapter, product: ProductSum | None, *, keeps_rest: bool) -> _Part:
    """The padded mean as it is stored, beside what it misses of the exact one."""
    if product is None:
        return _Part(trained)
    up_OR, down_RI = product.mean()
    rest = torch.cat([up_OR, trained.up_OR.double() * -trained.scaling], dim=1), torch.cat([down_RI, trained.down_RI.double()])
    whole = _squared_norm((up_OR, down_RI))
    if not keeps_rest:
        return _Part(trained, missed=_squared_norm(rest), whole=whole)
    factors = singular_factors(*rest)
    # Less than the rounding of the padded mean itself is not worth a column.
    rank = int((factors.values_R > whole**0.5 * torch.finfo(torch.float32).eps / 2).sum())
    kept = factors.up_OR[:, :rank] * factors.values_R[:rank], factors.down_RI[:rank]
    return _Part(trained, _adapter_of(kept, trained.scaling) if rank else None, whole=whole)


def _squared_norm(factors: Factors) -> float:
    up_OR, down_RI = factors
    return max(0.0, float(((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum()))


def _adapter_of(factors: Factors, scaling: float) -> ModuleAdapter:
    up_OR, down_RI = factors
    return ModuleAdapter(down_RI.float().contiguous(), (up_OR / scaling).float().contiguous(), scaling)


def _anew(name: str, old: ModuleAdapter, rank: int, seed: int, round: int) -> ModuleAdapter:
    """A new adapter in the place of another; each round has rows of its own."""
    alpha, round_seed = old.scaling * old.rank, stream(seed, "stack", round=round)
    return fresh_adapters("lora", {name: old.size}, {name: rank}, alpha, round_seed).modules[name]


def check_update(contribution: Contribution, reference: AdapterState, ranks: Mapping[str, int]) -> None:
    """Refuse an update that must not be averaged; `ranks` are those of the modules that the edge was given.

    Raises: UpdateRefusedError, AdapterFitError; both name edge and module.
    """
    where = f"edge {contribution.edge}"
    if contribution.num_examples <= 0:
        raise UpdateRefusedError(
            "an update without data", where=where, got=f"{contribution.num_examples} examples", expected="at least 1",
            do="check the edge's data",
        )  # fmt: skip
    for name, adapter in contribution.state.modules.items():
        known = reference.modules.get(name)
        fits = known is not None and (adapter.size, adapter.rank) == (known.size, ranks.get(name))
        if not fits or contribution.state.kind != reference.kind:
            raise AdapterFitError(
                "an update does not fit the common adapter", where=where,
                got=f"{contribution.state.kind} adapter of {name}, {adapter.size}, rank {adapter.rank}",
                expected=f"{reference.kind} adapters of the modules that the edge was given, of their sizes and ranks",
                do="use the same base and [adapter] on every edge",
            )  # fmt: skip
    for name, change in contribution.state.whole.items():
        start = reference.whole.get(name)
        if start is None or [t.shape for t in change.tensors] != [t.shape for t in start.tensors]:
            raise AdapterFitError(
                "an update does not fit what the edges share", where=where, got=f"the weight of {name}, {change.size}",
                expected="weights that the edge was given, of their sizes", do="use the same base and [adapter] on every edge",
            )  # fmt: skip
    if not contribution.state.is_finite():
        raise UpdateRefusedError(
            "an update holds numbers that are not finite", where=where, got="NaN or infinity", expected="finite numbers",
            do="lower learning_rate, or set grad_clip",
        )  # fmt: skip
