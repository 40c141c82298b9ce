"""Updates of unequal rank and partial weights become one: exact sum, then the best approximation of each edge's rank.

dW_m = sum_i p_i (alpha_i / r_i) B_i A_i, with p_i = |D_i| / sum of |D_j| over the edges j that trained module m.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from atoll.adapters.low_rank import SingularFactors, aligned, singular_factors
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AdapterFitError, UpdateRefusedError


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """What one edge sends: its adapter, and the weight of its data."""

    edge: str
    state: AdapterState
    num_examples: int


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """The new common adapter."""

    state: AdapterState
    discarded_share: float
    """Share of the exact sum's squared Frobenius norm that the ranks could not hold."""


def aggregate(contributions: Sequence[Contribution], ranks: Mapping[str, int], reference: AdapterState) -> Aggregate:
    """The data-weighted mean of the contributions, at the given ranks, in factors that lie near the reference's.

    A module that one edge alone trained is taken over as it is, bit for bit. A module that nobody trained stays as in `reference`.
    The order of the contributions does not matter. `check_update` has accepted every one of them.
    """
    ordered = sorted(contributions, key=lambda contribution: contribution.edge)
    by_module: dict[str, list[tuple[ModuleAdapter, int]]] = defaultdict(list)
    for contribution in ordered:
        for name, adapter in contribution.state.modules.items():
            by_module[name].append((adapter, contribution.num_examples))
    modules, kept, total = dict(reference.modules), 0.0, 0.0
    for name, parts in by_module.items():
        old = reference.modules[name]
        if reference.kind == "bottleneck":
            modules[name] = _mean_of_factors(parts)
        elif len(parts) == 1 and parts[0][0].rank == ranks[name]:
            modules[name] = parts[0][0]
        else:
            factors = exact_mean(parts)
            kept += float(factors.values_R[: ranks[name]].square().sum())
            total += float(factors.values_R.square().sum())
            modules[name] = at_rank(factors, ranks[name], old, old.scaling * old.rank / ranks[name])
    return Aggregate(AdapterState(reference.kind, modules), 1.0 - kept / total if total else 0.0)


def exact_mean(parts: Sequence[tuple[ModuleAdapter, int]]) -> SingularFactors:
    """The singular factors of sum p_i s_i B_i A_i, from the concatenation [p_i s_i B_i], [A_i]."""
    whole = sum(weight for _, weight in parts)
    up = torch.cat([adapter.up_OR.double() * (adapter.scaling * weight / whole) for adapter, weight in parts], dim=1)
    return singular_factors(up, torch.cat([adapter.down_RI for adapter, _ in parts]))


def at_rank(factors: SingularFactors, rank: int, reference: ModuleAdapter, scaling: float) -> ModuleAdapter:
    """The best approximation of this rank, in the reference's gauge; columns of `up` beyond the product's own rank are zero."""
    up, down = aligned(factors, reference.down_RI, rank)
    missing = rank - down.shape[0]
    if missing > 0:
        # The product has fewer singular values than the rank asked for: the free rows go on where the reference left off.
        spare = reference.down_RI[-missing:] if reference.rank >= missing else reference.down_RI.new_zeros(missing, down.shape[1])
        up, down = torch.cat([up, up.new_zeros(up.shape[0], missing)], dim=1), torch.cat([down, spare.double()])
    return ModuleAdapter(down.float().contiguous(), (up / scaling).float().contiguous(), scaling)


def for_edge(state: AdapterState, ranks: Mapping[str, int]) -> AdapterState:
    """The part of the common adapter that an edge trains: its modules, at its ranks, scaled by the run's alpha over the edge's rank."""
    modules = {}
    for name, rank in ranks.items():
        adapter = state.modules[name]
        if rank == adapter.rank:
            modules[name] = adapter
        else:
            factors = singular_factors(adapter.up_OR * adapter.scaling, adapter.down_RI)
            modules[name] = at_rank(factors, rank, adapter, adapter.scaling * adapter.rank / rank)
    return AdapterState(state.kind, modules)


def check_update(contribution: Contribution, reference: AdapterState) -> None:
    """Refuse an update that must not be averaged.

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
        if known is None or adapter.size != known.size or contribution.state.kind != reference.kind:
            raise AdapterFitError(
                "an update does not fit the common adapter", where=where,
                got=f"{contribution.state.kind} adapter of {name}, {adapter.size}",
                expected=f"{reference.kind} adapters of the run's modules, of their sizes",
                do="use the same base and [adapter] on every edge",
            )  # fmt: skip
    if not contribution.state.is_finite():
        raise UpdateRefusedError(
            "an update holds numbers that are not finite", where=where, got="NaN or infinity", expected="finite numbers",
            do="lower learning_rate, or set grad_clip",
        )  # fmt: skip


def _mean_of_factors(parts: Sequence[tuple[ModuleAdapter, int]]) -> ModuleAdapter:
    # A relu between the matrices leaves no product to average: the factors are averaged apart, which needs equal widths.
    if len({adapter.rank for adapter, _ in parts}) > 1:
        raise AdapterFitError(
            "bottleneck adapters of unequal width cannot be averaged", got=str([adapter.rank for adapter, _ in parts]),
            expected="one width", do="give every edge the same rank",
        )  # fmt: skip
    if len(parts) == 1:
        return parts[0][0]
    whole = sum(weight for _, weight in parts)
    down = torch.stack([adapter.down_RI.double() * (weight / whole) for adapter, weight in parts]).sum(0)
    up = torch.stack([adapter.up_OR.double() * (weight / whole) for adapter, weight in parts]).sum(0)
    return ModuleAdapter(down.float(), up.float(), parts[0][0].scaling)
