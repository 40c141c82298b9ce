"""The choice within a byte budget against every subset there is, with the byte formula itself as the oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.registry.parts import names
from atoll.selection.budget import Exchange, best_within
from atoll.selection.pool import PoolModule
from atoll.wire.byte_formulas import WireMode, split_bytes

NUM_BLOCKS = 4
EXCHANGES = st.builds(
    Exchange, d_model=st.sampled_from((4, 8)), num_tokens=st.integers(1, 9), num_wanted=st.integers(1, 9),
    codec=st.sampled_from(names("codec")), mode=st.sampled_from(get_args(WireMode)),
)  # fmt: skip


def oracle(active: Iterable[PoolModule], exchange: Exchange) -> int:
    """Both ways, counted by the protocol's own formula."""
    active = list(active)
    front = any(module.front for module in active)
    places = sorted({module.place for module in active if module.remote})
    groups = [[module.size for module in active if module.remote and module.place == place] for place in places]
    up, down = split_bytes(
        groups, exchange.d_model, exchange.num_tokens, exchange.num_wanted, exchange.codec, exchange.mode, shared=True,
        lowest_needs_input_gradient=front, front_gradient=front, has_factors=exchange.mode != "dense",
    )  # fmt: skip
    return up + down


@st.composite
def pools(draw: st.DrawFn) -> tuple[PoolModule, ...]:
    """Up to nine modules in up to four blocks, of which the cut keeps some; outputs and ranks differ."""
    front, back = draw(st.integers(0, 1)), draw(st.integers(0, 1))
    places = draw(st.lists(st.tuples(st.integers(0, NUM_BLOCKS - 1), st.integers(0, 3)), min_size=1, max_size=9).map(sorted))
    inputs = {place: draw(st.sampled_from((4, 8, 12))) for place in dict.fromkeys(places)}
    return tuple(
        PoolModule(
            f"module{number}", place, (inputs[place], draw(st.sampled_from((2, 8, 12))), draw(st.integers(1, 3))),
            remote=front <= place[0] < NUM_BLOCKS - back, front=place[0] < front,
        )
        for number, place in enumerate(places)
    )  # fmt: skip


@st.composite
def scored_pools(draw: st.DrawFn) -> tuple[tuple[PoolModule, ...], list[float]]:
    pool = draw(pools())
    # Whole numbers add up exactly, and are often equal.
    return pool, [float(draw(st.integers(0, 20))) for _ in pool]


BUDGETS = st.one_of(st.sampled_from((0.05, 0.1, 0.29, 0.5, 1.0)), st.floats(0.01, 1.0))


@settings(max_examples=300, deadline=None)
@given(scored_pools(), EXCHANGES, BUDGETS)
def test_no_subset_within_the_budget_scores_more(
    case: tuple[tuple[PoolModule, ...], list[float]], exchange: Exchange, budget: float
) -> None:
    pool, scores = case
    limit = math.floor(Fraction(repr(budget)) * oracle(pool, exchange))
    kept = best_within(pool, scores, exchange, budget)
    score, num_bytes = sum(scores[i] for i in kept), oracle((pool[i] for i in kept), exchange)
    within = []
    for size in range(1, len(pool) + 1):
        for subset in itertools.combinations(range(len(pool)), size):
            cost = oracle((pool[i] for i in subset), exchange)
            if cost <= limit:
                within.append((sum(scores[i] for i in subset), -cost))
    if within:
        assert (score, -num_bytes) == max(within)
    else:
        alone = [oracle([module], exchange) for module in pool]
        cheapest = [i for i in range(len(pool)) if alone[i] == min(alone)]
        assert kept == {max(cheapest, key=lambda i: (scores[i], -i))}


@settings(max_examples=50, deadline=None)
@given(scored_pools(), EXCHANGES)
def test_the_whole_budget_keeps_all_that_moved(case: tuple[tuple[PoolModule, ...], list[float]], exchange: Exchange) -> None:
    pool, scores = case
    kept = best_within(pool, scores, exchange, 1.0)
    assert kept >= {i for i, score in enumerate(scores) if score > 0}


def _layers(num_blocks: int, front: int) -> tuple[PoolModule, ...]:
    parts = (("q", 0, 64, 64), ("k", 0, 64, 16), ("v", 0, 64, 16), ("o", 1, 64, 64),
             ("gate", 2, 64, 172), ("up", 2, 64, 172), ("down", 3, 172, 64))  # fmt: skip
    return tuple(
        PoolModule(f"{block}.{name}", (block, stage), (d_in, d_out, 8), remote=block >= front, front=block < front)
        for block in range(num_blocks)
        for name, stage, d_in, d_out in parts
    )


@pytest.mark.parametrize("codec", names("codec"))
@pytest.mark.parametrize("mode", get_args(WireMode))
def test_a_large_pool_is_within_reach(mode: WireMode, codec: str) -> None:
    pool, exchange = _layers(32, 1), Exchange(64, 500, 120, codec, mode)
    scores = [math.sin(number) ** 2 for number in range(len(pool))]
    kept = best_within(pool, scores, exchange, 0.1)
    limit = 0.1 * oracle(pool, exchange)
    assert oracle((pool[i] for i in kept), exchange) <= limit
    # No module that was left out fits beside the others.
    left_out = [i for i in range(len(pool)) if i not in kept]
    assert all(oracle((pool[i] for i in {*kept, other}), exchange) > limit for other in left_out)


def test_the_first_of_equals_is_kept() -> None:
    pool = _layers(2, 0)[:2] + _layers(2, 0)[7:9]
    assert best_within(pool, [1.0] * 4, Exchange(64, 10, 10, "fp32", "dense"), 0.01) == {1}


def test_what_costs_nothing_more_comes_along() -> None:
    """Two modules behind the host's blocks and two before: the first are free, the others cost one gradient together."""
    pool = (
        PoolModule("front0", (0, 0), (8, 8, 2), remote=False, front=True),
        PoolModule("front1", (0, 3), (8, 8, 2), remote=False, front=True),
        PoolModule("middle", (1, 0), (8, 800, 2), remote=True),
        PoolModule("back0", (2, 0), (8, 8, 2), remote=False),
        PoolModule("back1", (2, 0), (8, 8, 2), remote=False),
    )
    exchange = Exchange(8, 10, 10, "fp32", "dense")
    assert best_within(pool, [0.0, 1.0, 9.0, 0.0, 1.0], exchange, 0.2) == {0, 1, 3, 4}
    assert best_within(pool, [0.0, 0.0, 9.0, 0.0, 1.0], exchange, 0.2) == {3, 4}
