"""Laws of averaging adapters of unequal rank and partial modules, by all five rules."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.config.checks.federation import rules_with
from atoll.errors import AdapterFitError, UpdateRefusedError
from atoll.federated.aggregation.aggregate import Aggregate, Aggregator, Common, joined, started
from atoll.federated.aggregation.edge_parts import LARGEST_FP16, EdgeParts
from atoll.federated.aggregation.norms import LARGEST_NORM
from atoll.federated.aggregation.spool import Contribution
from atoll.federated.aggregation.sums import PaddedSum, ProductSum
from atoll.federated.checks import check_update
from atoll.registry.parts import names

SIZES = {"a": (7, 9), "b": (9, 6), "wide": (40, 50)}
REFERENCE = fresh_adapters("lora", SIZES, {"a": 4, "b": 4, "wide": 4}, alpha=8, seed=0)
RANKS = REFERENCE.ranks
RULES = ("exact-svd", "delta-svd", "stack", "zero-pad", "residual")
CUT = ("exact-svd", "delta-svd")
EXACT = (*CUT, "stack", "residual")
AVERAGED = (*CUT, "zero-pad", "residual")


def contribution(seed: int, ranks: Mapping[str, int], num_examples: int = 1, kind: str = "lora") -> Contribution:
    g = torch.Generator().manual_seed(seed)
    modules = {
        name: ModuleAdapter(torch.randn(r, SIZES[name][0], generator=g), torch.randn(SIZES[name][1], r, generator=g), 8 / r)
        for name, r in ranks.items()
    }
    return Contribution(f"edge{seed}", AdapterState(kind, modules), num_examples)  # type: ignore[arg-type]


def aggregate(
    parts: Sequence[Contribution], ranks: Mapping[str, int] = RANKS, reference: AdapterState | Common = REFERENCE, rule: str = "exact-svd"
) -> Aggregate:
    common = reference if isinstance(reference, Common) else Common(reference)
    aggregator = Aggregator(rule, common, common.trained.ranks | dict(ranks))  # type: ignore[arg-type]
    given = EdgeParts(common.trained, rule)  # type: ignore[arg-type]
    for part in parts:
        aggregator.add(part, given.of(part.state.ranks))
    return aggregator.finish()


def change(outcome: Aggregate, name: str = "a") -> Tensor:
    """What the common adapter adds to a module's weight."""
    return joined(outcome.common).modules[name].delta_OI()


def mean_of(parts: Sequence[Contribution], name: str = "a") -> Tensor:
    """The oracle: dense products, averaged by data over those that trained the module."""
    voters = [part for part in parts if name in part.state.modules]
    whole = sum(part.weight for part in voters)
    products = [part.state.modules[name].delta_OI() * (part.weight / whole) for part in voters]
    return torch.stack(products).sum(0)


edges = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), min_size=2, max_size=5)


def test_the_rules_are_those_of_the_configuration() -> None:
    assert set(RULES) == set(names("aggregation"))
    assert set(rules_with("keeps_frozen_delta")) < set(RULES)


@pytest.mark.parametrize("rule", EXACT)
@given(setting=edges)
@settings(max_examples=15, deadline=None)
def test_at_full_rank_the_product_is_the_weighted_mean_of_products(rule: str, setting: list[tuple[int, int]]) -> None:
    """Those that cut need the whole rank for it; the others hold it at any."""
    parts = [contribution(i, {"a": rank}, n) for i, (rank, n) in enumerate(setting)]
    outcome = aggregate(parts, {"a": 7 if rule in CUT else 4}, rule=rule)
    torch.testing.assert_close(change(outcome), mean_of(parts), rtol=1e-4, atol=1e-4)
    assert outcome.discarded_share == pytest.approx(0, abs=1e-9)
    assert outcome.common.trained.ranks["a"] == (7 if rule in CUT else 4)


@pytest.mark.parametrize("rule", RULES)
@given(setting=edges, chance=st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_order_does_not_matter(rule: str, setting: list[tuple[int, int]], chance: random.Random) -> None:
    """Modules small and large: sums that are dense at the end, and such that are not."""
    parts = [contribution(i, {"a": rank, "b": 2, "wide": rank}, n) for i, (rank, n) in enumerate(setting)]
    one, other = (joined(aggregate(order, rule=rule).common) for order in (parts, chance.sample(parts, len(parts))))
    for name in SIZES:
        torch.testing.assert_close(one.modules[name].delta_OI(), other.modules[name].delta_OI(), rtol=1e-5, atol=1e-5)


@given(setting=edges, common=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_changes_are_added_to_what_was_there(setting: list[tuple[int, int]], common: int) -> None:
    """delta-svd against dense products, at full rank: what was common, and the mean of what each edge made of its part of it."""
    before = contribution(99, {"a": common}).state
    parts, given = [contribution(i, {"a": rank}, n) for i, (rank, n) in enumerate(setting)], EdgeParts(before, "delta-svd")
    whole, expected = sum(part.weight for part in parts), before.modules["a"].delta_OI()
    for part in parts:
        change_OI = part.state.modules["a"].delta_OI() - given.of(part.state.ranks).modules["a"].delta_OI()
        expected = expected + change_OI * (part.weight / whole)
    outcome = aggregate(parts, {"a": 7}, reference=before, rule="delta-svd")
    torch.testing.assert_close(change(outcome), expected, rtol=1e-4, atol=1e-4)


def test_an_edge_of_small_rank_that_learned_nothing_pulls_nothing_towards_zero() -> None:
    before = contribution(99, {"a": 4}).state
    given = EdgeParts(before, "exact-svd").of({"a": 1})
    idle = [Contribution("small", given, 3), Contribution("large", before, 1)]
    product = before.modules["a"].delta_OI()
    torch.testing.assert_close(change(aggregate(idle, reference=before, rule="delta-svd")), product, rtol=1e-5, atol=1e-5)
    assert change(aggregate(idle, reference=before, rule="exact-svd")).norm() < 0.9 * product.norm()


def test_changes_of_equal_ranks_are_the_exact_mean_bit_for_bit() -> None:
    before, parts = contribution(99, RANKS).state, [contribution(i, RANKS, 1 + i) for i in range(3)]
    one, other = (aggregate(parts, reference=before, rule=rule).common.trained for rule in CUT)
    assert one.digest() == other.digest()


def test_what_fp16_cannot_hold_is_never_sent() -> None:
    large = AdapterState("lora", {"a": ModuleAdapter(torch.full((4, 7), 7e4), torch.full((9, 4), 1e-6), 2.0)})
    assert all(tensor.isfinite().all() for tensor in EdgeParts(large, "exact-svd", "fp16").of({"a": 4}).modules["a"].tensors)
    assert LARGEST_NORM < LARGEST_FP16, "nor does it come back"


@pytest.mark.parametrize("rule", CUT)
def test_rows_of_a_become_as_long_as_edges_made_them_and_one_odd_edge_does_not_count(rule: str) -> None:
    parts = [contribution(seed, {"a": 4}) for seed in range(5)]
    lengths = [float(part.state.modules["a"].down_RI.double().square().sum(1).mean()) ** 0.5 for part in parts]
    odd = parts[lengths.index(max(lengths))]
    one = odd.state.modules["a"]
    swapped = AdapterState("lora", {"a": ModuleAdapter(one.down_RI * 1e4, one.up_OR / 1e4, one.scaling)})
    others = [part for part in parts if part is not odd]
    for sent in (parts, [*others, Contribution(odd.edge, swapped, 1)]):
        down_RI = aggregate(sent, {"a": 4}, rule=rule).common.trained.modules["a"].down_RI.double()
        torch.testing.assert_close(down_RI @ down_RI.T, torch.eye(4).double() * sorted(lengths)[2] ** 2, rtol=1e-4, atol=1e-4)
    # Beside one other edge, no length is longer than that one's and the old one.
    down_RI = aggregate([others[0], Contribution(odd.edge, swapped, 1)], {"a": 4}, rule=rule).common.trained.modules["a"].down_RI
    assert float(down_RI.norm(dim=1).max()) <= 1.0001 * float(others[0].state.modules["a"].down_RI.norm()) / 2


@given(setting=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_edges_that_learned_nothing_leave_every_bit_but_rounding_where_what_is_sent_is_rounded(setting: list[tuple[int, int]]) -> None:
    before = AdapterState("lora", {"a": contribution(99, {"a": 4}).state.modules["a"]})
    parts = EdgeParts(before, "delta-svd", "fp16")
    aggregator = Aggregator("delta-svd", Common(before), {"a": 4})
    for number, (rank, weight) in enumerate(setting):
        sent = parts.of({"a": rank})
        aggregator.add(Contribution(f"edge{number}", sent, weight), sent)
    after = aggregator.finish().common.trained.modules["a"].delta_OI()
    rounding = (parts.of({"a": 4}).modules["a"].delta_OI() - before.modules["a"].delta_OI()).abs().max()
    alone = len(setting) == 1 and setting[0][0] == 4
    assert float((after - before.modules["a"].delta_OI()).abs().max()) <= (float(rounding) if alone else 1e-5)


def test_edges_that_come_back_with_nothing_leave_rows_that_can_be_trained() -> None:
    empty = [Contribution(name, AdapterState("lora", {"a": ModuleAdapter(torch.zeros(4, 7), torch.zeros(9, 4), 2.0)}), 1) for name in "pq"]
    one = aggregate(empty, {"a": 4}).common.trained.modules["a"]
    assert not one.delta_OI().any()
    assert one.down_RI.any()
    assert all(tensor.isfinite().all() for tensor in (one.down_RI, one.up_OR))


@pytest.mark.parametrize("rule", CUT)
@given(setting=edges, common=st.integers(1, 7))
@settings(max_examples=15, deadline=None)
def test_truncation_error_is_the_discarded_singular_values(rule: str, setting: list[tuple[int, int]], common: int) -> None:
    """Of the mean of products; at the common rank of what was sent, which is that of all edges here, delta-svd has the same."""
    parts = [contribution(i, {"a": rank if rule == "exact-svd" else 4}, n) for i, (rank, n) in enumerate(setting)]
    outcome = aggregate(parts, {"a": common}, rule=rule)
    mean = mean_of(parts)
    values = torch.linalg.svdvals(mean)
    error = (change(outcome) - mean).norm()
    torch.testing.assert_close(error, values[common:].norm(), rtol=1e-4, atol=1e-4)
    share = float(values[common:].square().sum() / values.square().sum())
    assert outcome.discarded_share == pytest.approx(share, rel=1e-5, abs=1e-9)


@given(setting=edges)
@settings(max_examples=15, deadline=None)
def test_zero_padding_is_the_mean_of_padded_factors_and_says_what_it_misses(setting: list[tuple[int, int]]) -> None:
    parts = [contribution(i, {"a": rank}, n) for i, (rank, n) in enumerate(setting)]
    outcome, whole = aggregate(parts, {"a": 4}, rule="zero-pad"), sum(p.weight for p in parts)
    down, up = torch.zeros(4, 7).double(), torch.zeros(9, 4).double()
    for part in parts:
        one, share = part.state.modules["a"], part.weight / whole
        down[: one.rank] += share * one.down_RI
        up[:, : one.rank] += share * one.scaling * one.up_OR
    torch.testing.assert_close(change(outcome), up @ down, rtol=1e-5, atol=1e-5)
    mean = mean_of(parts)
    assert outcome.discarded_share == pytest.approx(float((mean - up @ down).norm() ** 2 / mean.norm() ** 2), rel=1e-4)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=5))
@settings(max_examples=10, deadline=None)
def test_zero_padding_is_exact_where_all_edges_have_the_same_a(weights: list[int]) -> None:
    first = contribution(0, {"a": 4}).state.modules["a"]
    others = [contribution(i, {"a": 4}, n) for i, n in enumerate(weights)]
    parts = [
        Contribution(o.edge, AdapterState("lora", {"a": ModuleAdapter(first.down_RI, o.state.modules["a"].up_OR, 2.0)}), o.weight)
        for o in others
    ]
    torch.testing.assert_close(change(aggregate(parts, rule="zero-pad")), mean_of(parts), rtol=1e-5, atol=1e-5)
    assert aggregate(parts, rule="residual").common.frozen_delta is None, "nothing is missed, and nothing has to be kept"


@pytest.mark.parametrize("rule", RULES)
@given(trained=edges, others=edges)
@settings(max_examples=10, deadline=None)
def test_edges_that_did_not_train_a_module_do_not_move_it(rule: str, trained: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    have = [contribution(i, {"a": rank, "b": rank}, n) for i, (rank, n) in enumerate(trained)]
    lack = [contribution(100 + i, {"a": rank}, n) for i, (rank, n) in enumerate(others)]
    with_them, without = (change(aggregate(parts, rule=rule), "b") for parts in ([*have, *lack], have))
    torch.testing.assert_close(with_them, without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_an_edge_that_did_not_train_a_module_leaves_its_bits(rule: str) -> None:
    only, other = contribution(1, {"a": 4, "b": 4}, 10), contribution(2, {"a": 4}, 1000)
    torch.testing.assert_close(change(aggregate([only, other], rule=rule), "b"), mean_of([only], "b"), rtol=1e-6, atol=1e-6)
    before = Common(REFERENCE, contribution(3, {"b": 2}).state if rule in rules_with("keeps_frozen_delta") else None)
    after = aggregate([other], reference=before, rule=rule).common
    assert torch.equal(after.trained.modules["b"].down_RI, REFERENCE.modules["b"].down_RI)
    assert torch.equal(joined(after).modules["b"].delta_OI(), joined(before).modules["b"].delta_OI())


@pytest.mark.parametrize("rule", AVERAGED)
def test_one_edge_is_taken_over_bit_for_bit(rule: str) -> None:
    only = contribution(1, RANKS)
    outcome = aggregate([only], rule=rule)
    assert joined(outcome.common).digest() == only.state.digest()
    assert outcome.common.frozen_delta is None


@pytest.mark.parametrize("rule", RULES)
def test_one_edge_of_smaller_rank_keeps_its_product(rule: str) -> None:
    """And what its rank did not reach can still be trained: no row of A is zero."""
    only = contribution(1, {"a": 2})
    outcome = aggregate([only], rule=rule)
    torch.testing.assert_close(change(outcome), mean_of([only]), rtol=1e-5, atol=1e-5)
    assert outcome.common.trained.modules["a"].down_RI.norm(dim=1).min() > 0.1


def test_factors_averaged_apart_would_be_wrong() -> None:
    """The mistake that exact averaging avoids: the mean of B times the mean of A is not the mean of B A."""
    parts = [contribution(1, {"a": 4}), contribution(2, {"a": 4})]
    a1, a2 = (p.state.modules["a"] for p in parts)
    apart = 2.0 * ((a1.up_OR + a2.up_OR) / 2) @ ((a1.down_RI + a2.down_RI) / 2)
    exact = change(aggregate(parts, {"a": 7}))
    assert (apart.double() - exact).norm() > 0.3 * exact.norm()
    assert aggregate(parts, rule="zero-pad").discarded_share > 0.09


@pytest.mark.parametrize("rule", rules_with("keeps_frozen_delta"))
def test_over_rounds_the_whole_is_the_mean_of_what_the_edges_had(rule: str) -> None:
    """Each edge's model is the frozen delta with its own adapter on it. Its ranks stop where the module's size does."""
    common = Common(REFERENCE)
    for round_number in range(1, 4):
        parts = [contribution(10 * round_number + i, {"a": 4, "b": 2, "wide": 3}, 1 + i) for i in range(3)]
        frozen_delta = {name: one.delta_OI() for name, one in common.frozen_delta.modules.items()} if common.frozen_delta else {}
        outcome = aggregate(parts, reference=common, rule=rule)
        for name in SIZES:
            expected = frozen_delta.get(name, torch.zeros(())) + mean_of(parts, name)
            torch.testing.assert_close(change(outcome, name), expected, rtol=1e-4, atol=1e-4)
        common = outcome.common
    assert common.frozen_delta is not None
    assert {name: rank <= min(SIZES[name]) for name, rank in common.frozen_delta.ranks.items()} == dict.fromkeys(SIZES, True)
    assert {name: rank <= min(SIZES[name]) for name, rank in joined(common).ranks.items()} == dict.fromkeys(SIZES, True)


def test_stacked_adapters_start_anew_in_every_round_and_the_same_in_every_rerun() -> None:
    def after(round_number: int, seed: int = 0) -> AdapterState:
        aggregator = Aggregator("stack", Common(REFERENCE), RANKS, seed=seed, round=round_number)
        aggregator.add(contribution(1, RANKS), REFERENCE)
        return aggregator.finish().common.trained

    assert all(not one.up_OR.any() and one.scaling == 2.0 for one in after(1).modules.values())
    assert after(1).digest() == after(1).digest()
    digests = {state.digest() for state in (REFERENCE, after(1), after(2), after(1, seed=1))}
    assert len(digests) == 4


def test_what_was_learned_before_a_stacked_run_is_its_frozen_delta() -> None:
    state = contribution(1, RANKS).state
    common = started(state, "stack", 0)
    assert common.frozen_delta is not None
    assert joined(common).digest() == state.digest()
    assert not any(one.up_OR.any() for one in common.trained.modules.values())
    assert started(REFERENCE, "stack", 0).trained is REFERENCE
    assert started(state, "residual", 0).trained is state


@pytest.mark.parametrize("rule", RULES)
def test_memory_does_not_grow_with_the_number_of_edges(rule: str) -> None:
    aggregator, held = Aggregator(rule, Common(REFERENCE), RANKS), []  # type: ignore[arg-type]
    parts = [contribution(i, {"a": 1 + i % 4, "wide": 1 + i % 4}, 1 + i % 7) for i in range(1000)]
    given = EdgeParts(REFERENCE, rule)  # type: ignore[arg-type]
    for part in parts:
        aggregator.add(part, given.of(part.state.ranks))
        held.append(aggregator.num_held)
    sizes = [SIZES[name][0] * SIZES[name][1] for name in ("a", "wide")]
    assert max(held) <= sum(sizes) * 5 // 4
    assert held[-1] >= sum(sizes), "both sums are dense"
    outcome = aggregator.finish()
    assert max(joined(outcome.common).ranks.values()) <= 40
    if rule in EXACT:
        mean = mean_of(parts)
        at_rank_4 = (lambda u, s, v: (u[:, :4] * s[:4]) @ v[:4])(*torch.linalg.svd(mean, full_matrices=False))
        torch.testing.assert_close(change(outcome), at_rank_4 if rule in CUT else mean, rtol=1e-4, atol=1e-5)


@given(setting=edges)
@settings(max_examples=20, deadline=None)
def test_a_running_sum_is_the_same_before_and_after_it_gets_dense(setting: list[tuple[int, int]]) -> None:
    parts = [contribution(i, {"a": rank}, n) for i, (rank, n) in enumerate(setting)]
    running = ProductSum(SIZES["a"])
    for number, part in enumerate(parts):
        running.add(part.state.modules["a"], part.weight)
        up, down = running.mean()
        assert up.shape[1] <= 7 or number == 0
        torch.testing.assert_close(up @ down, mean_of(parts[: number + 1]), rtol=1e-12, atol=1e-12)


def test_a_padded_sum_asks_for_the_rows_that_nobody_has() -> None:
    asked: list[int] = []

    def spare(first: int) -> Tensor:
        asked.append(first)
        return torch.ones(4 - first, 7)

    running = PaddedSum(SIZES["a"], 4, 2.0)
    running.add(contribution(1, {"a": 1}).state.modules["a"], 5)
    running.add(contribution(2, {"a": 3}).state.modules["a"], 5)
    mean = running.mean(spare)
    assert asked == [3]
    assert mean.down_RI[3].tolist() == [1.0] * 7
    assert mean.up_OR[:, 3].tolist() == [0.0] * 9


@pytest.mark.parametrize("rule", RULES)
def test_an_edge_gets_its_modules_at_its_ranks(rule: str) -> None:
    state = contribution(1, {"a": 4, "b": 4}).state
    small = EdgeParts(state, rule).of({"a": 2})  # type: ignore[arg-type]
    assert small.ranks == {"a": 2}
    one, adapter = state.modules["a"], small.modules["a"]
    assert adapter.scaling == pytest.approx(8 / 2)
    sliced = one.scaling * one.up_OR[:, :2].double() @ one.down_RI[:2].double()
    expected = state.truncate(2).modules["a"].delta_OI() if rule in CUT else sliced
    torch.testing.assert_close(adapter.delta_OI(), expected, rtol=1e-4, atol=1e-5)
    assert EdgeParts(state, rule).of(state.ranks).digest() == state.digest()  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
def test_what_an_edge_gets_and_sends_back_untrained_changes_nothing(rule: str) -> None:
    """Of smaller rank alone, because a part is less than the whole; padding has to undo what slicing did to the scaling."""
    state = contribution(1, {"a": 4}).state
    parts = EdgeParts(state, rule)  # type: ignore[arg-type]
    back = [Contribution(f"edge{i}", parts.of({"a": 2}), 1 + i) for i in range(2)]
    outcome = aggregate(back, {"a": 4}, state, rule)
    left = state if rule == "delta-svd" else back[0].state
    torch.testing.assert_close(change(outcome), left.modules["a"].delta_OI(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_fresh_adapter_stays_fresh_at_any_rank(rule: str) -> None:
    parts = EdgeParts(REFERENCE, rule)  # type: ignore[arg-type]
    for rank in (1, 2, 4, 6, 12):
        part = parts.of({"a": rank}).modules["a"]
        assert part.rank == rank
        assert part.up_OR.abs().max() == 0
        assert part.down_RI.isfinite().all()
        assert part.down_RI.norm(dim=1).min() > 0.1, "a row of zeros would never be trained"


@pytest.mark.parametrize("rule", RULES)
def test_a_larger_common_rank_than_before_holds_the_same(rule: str) -> None:
    parts = [contribution(1, {"a": 6}), contribution(2, {"a": 6})]
    outcome = aggregate(parts, {"a": 6}, rule=rule)
    assert outcome.common.trained.ranks == {**RANKS, "a": 6}
    assert outcome.common.trained.modules["a"].scaling == pytest.approx(8 / 6)
    if rule in ("stack", "residual"):
        torch.testing.assert_close(change(outcome), mean_of(parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["exact-svd", "zero-pad"])
def test_bottleneck_factors_are_averaged_apart(rule: str) -> None:
    reference = AdapterState("bottleneck", REFERENCE.modules)
    parts = [contribution(1, {"a": 4}, 1, "bottleneck"), contribution(2, {"a": 4}, 3, "bottleneck")]
    mean = aggregate(parts, reference=reference, rule=rule).common.trained.modules["a"]
    expected = 0.25 * parts[0].state.modules["a"].down_RI + 0.75 * parts[1].state.modules["a"].down_RI
    torch.testing.assert_close(mean.down_RI, expected)
    with pytest.raises(AdapterFitError, match="unequal width"):
        aggregate([parts[0], contribution(3, {"a": 2}, 1, "bottleneck")], reference=reference, rule=rule)
    with pytest.raises(AdapterFitError, match="unequal width"):
        EdgeParts(reference, rule).of({"a": 2})  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", rules_with("keeps_frozen_delta"))
def test_bottlenecks_have_no_product_for_a_frozen_delta(rule: str) -> None:
    with pytest.raises(AdapterFitError, match="no product"):
        aggregate([], reference=AdapterState("bottleneck", REFERENCE.modules), rule=rule)


def poisoned(value: float) -> AdapterState:
    state = contribution(1, {"a": 4}).state
    state.modules["a"].up_OR[0, 0] = value
    return state


@pytest.mark.parametrize(("state", "error", "match"), [
    (poisoned(float("nan")), UpdateRefusedError, "not finite"),
    (poisoned(float("inf")), UpdateRefusedError, "not finite"),
    (AdapterState("lora", {"c": contribution(1, {"a": 4}).state.modules["a"]}), AdapterFitError, "does not fit"),
    (AdapterState("lora", {"b": contribution(1, {"a": 4}).state.modules["a"]}), AdapterFitError, "does not fit"),
    (contribution(1, {"a": 4}, kind="bottleneck").state, AdapterFitError, "does not fit"),
    (contribution(1, {"a": 3}).state, AdapterFitError, "does not fit"),
    (contribution(1, {"wide": 4}).state, AdapterFitError, "does not fit"),
])  # fmt: skip
def test_updates_that_must_not_be_averaged(state: AdapterState, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        check_update(Contribution("north", state, 1), EdgeParts(REFERENCE, "exact-svd").of({"a": 4, "b": 4}))
    assert caught.value.where == "edge north"  # type: ignore[attr-defined]
