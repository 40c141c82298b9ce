"""Median, trimmed mean and clipping of products: against plain ones on dense stacks, and their laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.low_rank import row_length
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AdapterFitError
from atoll.federated.aggregation import robust as module
from atoll.federated.aggregation.aggregate import Aggregate, Common, aggregate
from atoll.federated.aggregation.robust import Robust, clip_updates, moved
from atoll.federated.aggregation.spool import Contribution, Spool

from tests.federated.test_aggregation import REFERENCE, contribution

FULL = {"a": 7, "b": 6, "wide": 40}
"""Ranks at which any product can be held."""
counts = st.integers(1, 6)


def combined(parts: Sequence[Contribution], robust: Robust, ranks: dict[str, int] = FULL, aggregation: str = "exact-svd") -> Aggregate:
    with Spool() as spool:
        for part in parts:
            spool.put(part)
        return aggregate(spool, aggregation, Common(REFERENCE), ranks, lambda edge: REFERENCE, robust=robust)  # type: ignore[arg-type]


def edges(count: int, seed: int = 0, rank: int = 3) -> list[Contribution]:
    return [contribution(100 * seed + i, {"a": 1 + (i + rank) % 4, "wide": rank}, 1 + 9 * i) for i in range(count)]


def _with(state: AdapterState, full: AdapterState) -> AdapterState:
    return AdapterState("lora", state.modules, full.full_weights)


def stack(parts: Sequence[Contribution], name: str = "a") -> Tensor:
    return torch.stack([part.state.modules[name].delta_OI() for part in parts if name in part.state.modules])


def trimmed(values_E: Tensor, cut: int) -> Tensor:
    """Written plainly: number by number."""
    flat = values_E.reshape(len(values_E), -1)
    means = []
    for column in flat.T:
        kept = sorted(column.tolist())[cut : len(column) - cut]
        means.append(sum(kept) / len(kept))
    return torch.tensor(means, dtype=torch.float64).reshape(values_E.shape[1:])


@pytest.mark.parametrize("name", ["a", "wide"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_median_is_torchs_median_of_dense_products(count: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few rows; of an even number, the mean of the two in the middle."""
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", 300)
    parts = edges(count)
    values, found = stack(parts, name), combined(parts, Robust("median")).common.trained.modules[name].delta_OI()
    lower = values.median(dim=0).values
    expected = lower if count % 2 else (lower - (-values).median(dim=0).values) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "trim", "cut"), [(5, 0.2, 1), (5, 0.19, 0), (6, 0.4, 2), (10, 0.3, 3), (3, 0.49, 1)])
def test_the_trimmed_mean_is_that_of_sorted_lists(count: int, trim: float, cut: int) -> None:
    parts = edges(count)
    found = combined(parts, Robust("trimmed-mean", trim)).common.trained.modules["a"].delta_OI()
    torch.testing.assert_close(found, trimmed(stack(parts), cut), rtol=1e-4, atol=1e-4)


def test_at_a_smaller_rank_it_is_the_best_approximation_and_says_what_it_discards() -> None:
    parts = edges(5)
    outcome = combined(parts, Robust("median"), {"a": 3, "wide": 4})
    u, s, v = torch.linalg.svd(stack(parts).median(dim=0).values, full_matrices=False)
    torch.testing.assert_close(outcome.common.trained.modules["a"].delta_OI(), (u[:, :3] * s[:3]) @ v[:3], rtol=1e-4, atol=1e-4)
    assert 0 < outcome.discarded_share < 1


@given(count=st.integers(2, 6), seed=st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_with_nothing_trimmed_it_is_the_mean_where_all_edges_count_the_same(count: int, seed: int) -> None:
    parts = edges(count, seed)
    found = combined(parts, Robust("trimmed-mean", 0.0)).common.trained.modules["a"].delta_OI()
    torch.testing.assert_close(found, stack(parts).mean(dim=0), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 50), size=st.floats(-1e6, 1e6), which=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_one_arbitrary_edge_of_five_leaves_the_median_among_the_good_ones(seed: int, size: float, which: int) -> None:
    parts = edges(5, seed)
    good = [part for i, part in enumerate(parts) if i != which]
    bad = Contribution(parts[which].edge, parts[which].state.scale(size), 10**6)
    values = stack(good)
    for robust in (Robust("median"), Robust("trimmed-mean", 0.2)):
        found = combined([*good, bad], robust).common.trained.modules["a"].delta_OI()
        slack = 1e-5 * float(values.abs().max())
        assert bool((found >= values.min(dim=0).values - slack).all())
        assert bool((found <= values.max(dim=0).values + slack).all())


@given(st.permutations(range(5)), st.sampled_from(["mean", "median", "trimmed-mean"]), st.sampled_from([None, "auto", 2.0]))
@settings(max_examples=15, deadline=None)
def test_order_changes_no_bit(order: list[int], combine: str, clip: float | None) -> None:
    parts, robust = edges(5), Robust(combine, 0.2, clip)  # type: ignore[arg-type]
    one, other = (combined(some, robust, {"a": 4, "wide": 4}) for some in (parts, [parts[i] for i in order]))
    assert one.common.trained.digest() == other.common.trained.digest()


@pytest.mark.parametrize("combine", ["median", "trimmed-mean"])
def test_only_edges_that_trained_a_module_vote_and_one_alone_is_taken_over(combine: str) -> None:
    parts = [*edges(3), contribution(50, {"b": 4}, 5)]
    outcome = combined(parts, Robust(combine), {"a": 7, "b": 4, "wide": 40})  # type: ignore[arg-type]
    assert torch.equal(outcome.common.trained.modules["b"].up_OR, parts[-1].state.modules["b"].up_OR)
    alone = combined(parts[:3], Robust(combine), FULL)  # type: ignore[arg-type]
    assert torch.equal(outcome.common.trained.modules["a"].up_OR, alone.common.trained.modules["a"].up_OR)


@pytest.mark.parametrize("combine", ["median", "trimmed-mean"])
def test_rows_of_a_get_the_median_length_that_no_odd_edge_moves(combine: str) -> None:
    first, *others = edges(5)
    one = first.state.modules["a"]
    odd = Contribution("odd", AdapterState("lora", {"a": ModuleAdapter(one.down_RI * 1e4, one.up_OR / 1e4, one.scaling)}), 1)
    for parts in ([first, *others], [odd, *others]):
        found = combined(parts, Robust(combine), FULL).common.trained.modules["a"].down_RI  # type: ignore[arg-type]
        length = sorted(row_length(part.state.modules["a"].down_RI) for part in parts)[2]
        torch.testing.assert_close(found.norm(dim=1), torch.full((7,), length), rtol=1e-4, atol=1e-4)


def whole(seed: int) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    return AdapterState("lora", {}, {"head": FullWeightDelta(torch.randn(5, 6, generator=g), torch.randn(5, generator=g))})


@pytest.mark.parametrize("block", [1, 10**6])
def test_whole_weights_are_combined_as_they_are(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", block)
    states = [whole(i) for i in range(5)]
    with Spool() as spool:
        for number, state in enumerate(states):
            spool.put(Contribution(f"edge{number}", state, 1 + number))
        outcome = aggregate(spool, "exact-svd", Common(whole(9)), {}, lambda edge: whole(9), robust=Robust("median"))
    for number, tensor in enumerate(outcome.common.trained.full_weights["head"].tensors):
        assert torch.equal(tensor, torch.stack([state.full_weights["head"].tensors[number] for state in states]).median(dim=0).values)


@given(count=counts, seed=st.integers(0, 50), limit=st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_no_clipped_update_moves_further_and_it_keeps_its_direction(count: int, seed: int, limit: float) -> None:
    sent = AdapterState("lora", {**edges(1, seed + 1)[0].state.modules, "wide": REFERENCE.modules["wide"]}, whole(1).full_weights)
    parts = [replace(one, state=_with(one.state, whole(i)), weight=1) for i, one in enumerate(edges(count, seed))]
    with Spool() as spool:
        for part in parts:
            spool.put(part)
        told = clip_updates(spool, limit, lambda edge: sent)
        clipped = {part.edge: part for part in spool}
    norms = {part.edge: moved(part.state, sent) for part in parts}
    assert {one.edge: one.norm for one in told} == {edge: norm for edge, norm in norms.items() if norm > limit}
    assert all(one.limit == limit for one in told)
    for part in parts:
        before, after = norms[part.edge], moved(clipped[part.edge].state, sent)
        assert after <= min(before, limit) * (1 + 1e-5)
        if before <= limit:
            assert clipped[part.edge].state.digest() == part.state.digest()
            continue
        for name in ("a", "wide"):
            start, end = sent.modules[name].delta_OI(), part.state.modules[name].delta_OI()
            expected = start + limit / before * (end - start)
            torch.testing.assert_close(clipped[part.edge].state.modules[name].delta_OI(), expected, rtol=1e-4, atol=1e-4)


def test_the_distance_is_that_of_dense_products() -> None:
    one, other = edges(1, 1)[0].state, edges(1, 2)[0].state
    apart = sum(float((one.modules[name].delta_OI() - other.modules[name].delta_OI()).square().sum()) for name in one.modules)
    assert moved(one, other) == pytest.approx(apart**0.5, rel=1e-9)
    assert moved(one, one) == pytest.approx(0, abs=1e-6)


def test_a_clipped_edge_of_half_the_rank_that_is_alone_keeps_the_runs_scaling() -> None:
    sent = AdapterState("lora", {"a": edges(1, 7, 1)[0].state.modules["a"]})
    only = contribution(3, {"a": sent.modules["a"].rank})
    for combine in ("mean", "median"):
        with Spool() as spool:
            spool.put(only)
            outcome = aggregate(spool, "exact-svd", Common(REFERENCE), {"a": 4}, lambda edge: sent, robust=Robust(combine, clip=1.0))  # type: ignore[arg-type]
        one = outcome.common.trained.modules["a"]
        assert (one.rank, one.scaling, one.up_OR.dtype) == (4, 2.0, torch.float32)
        assert float((one.delta_OI() - sent.modules["a"].delta_OI()).norm()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("aggregation", ["exact-svd", "stack"])
def test_a_limit_above_all_norms_changes_no_bit(aggregation: str) -> None:
    parts = edges(4)
    free, held = (combined(parts, Robust(clip=clip), {"a": 4, "wide": 4}, aggregation).common for clip in (None, 1e9))
    assert free.trained.digest() == held.trained.digest()
    assert (free.frozen_delta is None) == (held.frozen_delta is None)
    assert free.frozen_delta is None or free.frozen_delta.digest() == held.frozen_delta.digest()  # type: ignore[union-attr]


def test_by_itself_the_limit_is_the_median_of_the_norms() -> None:
    parts = edges(5)
    norms = sorted(moved(part.state, REFERENCE) for part in parts)
    with Spool() as spool:
        for part in parts:
            spool.put(part)
        clip_updates(spool, "auto", lambda edge: REFERENCE)
        after = sorted(moved(part.state, REFERENCE) for part in spool)
    assert after == pytest.approx([min(norm, norms[2]) for norm in norms], rel=1e-5)


@pytest.mark.parametrize(("robust", "aggregation", "kind"), [
    (Robust("median"), "stack", "lora"), (Robust("trimmed-mean"), "zero-pad", "lora"), (Robust("median"), "exact-svd", "bottleneck"),
    (Robust(clip=1.0), "zero-pad", "lora"), (Robust(clip="auto"), "exact-svd", "bottleneck"),
])  # fmt: skip
def test_what_has_no_products_is_refused(robust: Robust, aggregation: str, kind: str) -> None:
    with pytest.raises(AdapterFitError, match="products"):
        robust.check(aggregation, AdapterState(kind, {}))  # type: ignore[arg-type]


def test_a_spool_gives_back_what_was_put_bit_for_bit() -> None:
    parts = [replace(one, state=_with(one.state, whole(i)), weight=2 + i) for i, one in enumerate(edges(3))]
    no_bias = AdapterState("lora", {}, {"head": FullWeightDelta(torch.ones(2, 3))})
    with Spool() as spool:
        for part in reversed(parts):
            spool.put(part)
        spool.put(Contribution("last", no_bias, 1))
        assert spool.edges == [*(part.edge for part in parts), "last"]
        for part, kept in zip(parts, spool, strict=False):
            assert (kept.edge, kept.weight, kept.state.digest()) == (part.edge, part.weight, part.state.digest())
        assert spool.read("last").state.digest() == no_bias.digest()
        one = parts[1].state.modules["wide"]
        torch.testing.assert_close(spool.product_rows(parts[1].edge, "wide", 3, 9), one.delta_OI()[3:9], rtol=1e-12, atol=1e-12)
        spool.drop("last")
        assert spool.voters() == {"a": spool.edges, "wide": spool.edges, "head": spool.edges}
        assert isinstance(spool.adapter(parts[0].edge, "a"), ModuleAdapter)
