"""Laws of averaging adapters of unequal rank and partial modules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.engines.federated.aggregation import Contribution, aggregate, check_update, for_edge
from atoll.errors import AdapterFitError, UpdateRefusedError

SIZES = {"a": (7, 9), "b": (9, 6)}
REFERENCE = fresh_adapters("lora", SIZES, {"a": 4, "b": 4}, alpha=8, seed=0)


def contribution(seed: int, ranks: dict[str, int], num_examples: int = 1, kind: str = "lora") -> Contribution:
    g = torch.Generator().manual_seed(seed)
    modules = {
        name: ModuleAdapter(torch.randn(r, SIZES[name][0], generator=g), torch.randn(SIZES[name][1], r, generator=g), 8 / r)
        for name, r in ranks.items()
    }
    return Contribution(f"edge{seed}", AdapterState(kind, modules), num_examples)  # type: ignore[arg-type]


edges = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 50)), min_size=2, max_size=5)


@given(edges)
@settings(max_examples=25, deadline=None)
def test_at_full_rank_the_product_is_the_weighted_mean_of_products(setting: list[tuple[int, int]]) -> None:
    parts = [contribution(i, {"a": rank}, n) for i, (rank, n) in enumerate(setting)]
    outcome = aggregate(parts, {"a": 7, "b": 4}, REFERENCE)
    whole = sum(p.num_examples for p in parts)
    mean = sum(p.state.modules["a"].delta_OI() * (p.num_examples / whole) for p in parts)
    torch.testing.assert_close(outcome.state.modules["a"].delta_OI(), mean, rtol=1e-4, atol=1e-4)
    assert outcome.discarded_share == pytest.approx(0, abs=1e-9)


@given(edges)
@settings(max_examples=15, deadline=None)
def test_order_does_not_matter(setting: list[tuple[int, int]]) -> None:
    parts = [contribution(i, {"a": rank, "b": 2}, n) for i, (rank, n) in enumerate(setting)]
    ranks = {"a": 3, "b": 4}
    assert aggregate(parts, ranks, REFERENCE).state.digest() == aggregate(parts[::-1], ranks, REFERENCE).state.digest()


def test_truncation_error_is_the_discarded_singular_values() -> None:
    parts = [contribution(1, {"a": 4}), contribution(2, {"a": 4})]
    outcome = aggregate(parts, {"a": 3, "b": 4}, REFERENCE)
    mean = sum(p.state.modules["a"].delta_OI() for p in parts) / 2
    values = torch.linalg.svdvals(mean)
    error = (outcome.state.modules["a"].delta_OI() - mean).norm()
    torch.testing.assert_close(error, values[3:].norm(), rtol=1e-4, atol=1e-5)
    assert outcome.discarded_share == pytest.approx(float(values[3:].square().sum() / values.square().sum()), rel=1e-6)


def test_an_edge_that_did_not_train_a_module_does_not_move_it() -> None:
    only = contribution(1, {"a": 4, "b": 4}, 10)
    outcome = aggregate([only, contribution(2, {"a": 4}, 1000)], {"a": 4, "b": 4}, REFERENCE)
    assert torch.equal(outcome.state.modules["b"].up_OR, only.state.modules["b"].up_OR)
    untouched = aggregate([contribution(2, {"a": 4})], {"a": 4, "b": 4}, REFERENCE).state.modules["b"]
    assert torch.equal(untouched.down_RI, REFERENCE.modules["b"].down_RI)


def test_one_edge_is_taken_over_bit_for_bit() -> None:
    only = contribution(1, {"a": 4, "b": 4})
    assert aggregate([only], {"a": 4, "b": 4}, REFERENCE).state.digest() == only.state.digest()


def test_factors_averaged_apart_would_be_wrong() -> None:
    """The mistake that exact averaging avoids: the mean of B times the mean of A is not the mean of B A."""
    parts = [contribution(1, {"a": 4}), contribution(2, {"a": 4})]
    a1, a2 = (p.state.modules["a"] for p in parts)
    apart = 2.0 * ((a1.up_OR + a2.up_OR) / 2) @ ((a1.down_RI + a2.down_RI) / 2)
    exact = aggregate(parts, {"a": 7, "b": 4}, REFERENCE).state.modules["a"].delta_OI()
    assert (apart.double() - exact).norm() > 0.3 * exact.norm()


def test_an_edge_of_smaller_rank_gets_the_best_approximation() -> None:
    state = aggregate([contribution(1, {"a": 4}), contribution(2, {"a": 2})], {"a": 4, "b": 4}, REFERENCE).state
    small = for_edge(state, {"a": 2})
    assert small.ranks == {"a": 2}
    assert small.modules["a"].scaling == pytest.approx(8 / 2)
    torch.testing.assert_close(small.modules["a"].delta_OI(), state.truncate(2).modules["a"].delta_OI(), rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_stays_fresh_at_any_rank() -> None:
    for rank in (1, 2, 4, 6):
        part = for_edge(REFERENCE, {"a": rank}).modules["a"]
        assert part.rank == rank
        assert part.up_OR.abs().max() == 0
        assert part.down_RI.isfinite().all()
        assert part.down_RI[:4].norm(dim=1).min() > 0.1


def test_bottleneck_factors_are_averaged_apart() -> None:
    reference = AdapterState("bottleneck", REFERENCE.modules)
    parts = [contribution(1, {"a": 4}, 1, "bottleneck"), contribution(2, {"a": 4}, 3, "bottleneck")]
    mean = aggregate(parts, {"a": 4, "b": 4}, reference).state.modules["a"]
    expected = 0.25 * parts[0].state.modules["a"].down_RI + 0.75 * parts[1].state.modules["a"].down_RI
    torch.testing.assert_close(mean.down_RI, expected)
    with pytest.raises(AdapterFitError, match="unequal width"):
        aggregate([parts[0], contribution(3, {"a": 2}, 1, "bottleneck")], {"a": 4, "b": 4}, reference)


def poisoned(value: float) -> AdapterState:
    state = contribution(1, {"a": 4}).state
    state.modules["a"].up_OR[0, 0] = value
    return state


@pytest.mark.parametrize(("state", "num_examples", "error", "match"), [
    (poisoned(float("nan")), 1, UpdateRefusedError, "not finite"),
    (poisoned(float("inf")), 1, UpdateRefusedError, "not finite"),
    (contribution(1, {"a": 4}).state, 0, UpdateRefusedError, "without data"),
    (AdapterState("lora", {"c": contribution(1, {"a": 4}).state.modules["a"]}), 1, AdapterFitError, "does not fit"),
    (AdapterState("lora", {"b": contribution(1, {"a": 4}).state.modules["a"]}), 1, AdapterFitError, "does not fit"),
    (contribution(1, {"a": 4}, kind="bottleneck").state, 1, AdapterFitError, "does not fit"),
])  # fmt: skip
def test_updates_that_must_not_be_averaged(state: AdapterState, num_examples: int, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        check_update(Contribution("north", state, num_examples), REFERENCE)
    assert caught.value.where == "edge north"  # type: ignore[attr-defined]
