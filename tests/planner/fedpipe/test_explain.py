"""Reasons of a plan: a limit that is said to bind decides something, prices are what deciding again gives, and the words say it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import InfeasibleError
from atoll.planner.edge_plan import EdgePlan
from atoll.planner.fedpipe import explain
from atoll.planner.fedpipe.explain import Price
from atoll.planner.fedpipe.search import EdgeSearch
from atoll.planner.request import EdgeRequest

from tests.planner.fedpipe.fleets import SHAPES, TARGETS, config, planned

SPEED = {"flops": 1.5e8, "bandwidth": 1e7, "latency": 0.01}
MEMORY, SECONDS = st.integers(4_000_000, 4_700_000), st.floats(0.5, 3.0)


def plan(memory: int | None, deadline: float | None, seed: int = 0, **fields: Any) -> EdgePlan:
    limit = {} if memory is None else {"memory": memory}
    return planned(config([{**SPEED, **limit, **fields}], {"round_deadline": deadline}), seed=seed).edges[0]


def decided(one: EdgePlan) -> tuple[object, ...]:
    return one.mode, one.bits, one.batch_size, one.gradient_checkpointing, pytest.approx(one.objective, rel=1e-6)


@given(memory=MEMORY, deadline=SECONDS, seed=st.integers(0, 10**6))
@settings(max_examples=12, deadline=None)
def test_the_limits_that_bind_are_those_without_which_the_plan_is_another(memory: int, deadline: float, seed: int) -> None:
    try:
        now = plan(memory, deadline, seed)
    except InfeasibleError:
        return
    for limit, without in (("memory", plan(None, deadline, seed)), ("deadline", plan(memory, None, seed))):
        assert (limit in now.binding) == (decided(without) != decided(now)), limit


@given(memory=MEMORY, deadline=SECONDS, seed=st.integers(0, 10**6))
@settings(max_examples=12, deadline=None)
def test_a_price_is_what_deciding_again_with_more_gives(memory: int, deadline: float, seed: int) -> None:
    more = {"memory": 200_000, "deadline": 0.3}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(explain, "MORE_BYTES", more["memory"])
        patched.setattr(explain, "MORE_SECONDS", more["deadline"])
        try:
            now = plan(memory, deadline, seed)
        except InfeasibleError:
            return
    assert [price.limit for price in now.prices] == (now.binding.split(", ") if now.binding != "none" else [])
    for price in now.prices:
        wider = plan(memory + 200_000, deadline, seed) if price.limit == "memory" else plan(memory, deadline + 0.3, seed)
        assert price.more == more[price.limit]
        assert (price.mode, price.bits, price.batch_size) == (wider.mode, wider.bits, wider.batch_size)
        assert price.objective == pytest.approx(wider.objective, rel=1e-6)
        assert price.objective >= (now.objective or 0.0)


def test_an_edge_without_limits_is_said_to_have_none() -> None:
    assert plan(None, None).why == (
        "the whole base here in 16 bits; rank 4 on 4 of 4 weights, worth 100.0% of the largest ranks on all; no limit binds"
    )


def test_the_words_say_where_why_and_what_more_would_buy() -> None:
    assert plan(4_150_000, None, mode="local").why == (
        "the whole base here in 4 bits, as 8 bits here would need at least 15.6 kB more memory; rank 4 on 2 of 4 weights, "
        "worth 58.3% of the largest ranks on all; memory holds no warm-up, so that its rows have no say in what matters; "
        "memory binds; 1 GB more: 4 to 16 bits, batch 1 to 4, worth 58.3% to 100.0%"
    )


def test_what_wider_weights_would_be_worth_is_said() -> None:
    now = plan(4_200_000, None, mode="local")
    assert now.bits == 4
    wider = plan(4_200_000, None, bits=8, mode="local")
    assert f"the whole base here in 4 bits, as 8 bits here would be worth {wider.objective:.1%}; " in now.why
    assert (wider.objective or 0.0) < (now.objective or 0.0)


def test_what_a_host_would_keep_is_said() -> None:
    words = plan(4_050_000, None).why
    assert words.startswith("blocks 0 to 1 in the host, as 4 bits here would need at least ")
    assert "1 GB more: split to local, " in words


def test_a_deadline_is_no_limit_of_an_edge_that_declares_no_speed() -> None:
    still = {"flops": None, "bandwidth": None, "latency": None}
    assert plan(None, 0.001, **still).binding == "none"


def test_a_price_that_changes_nothing_says_so() -> None:
    asked = config([{}])
    pool = [module.name for module in SHAPES.modules if module.last_name in TARGETS]
    now = EdgeSearch(asked, SHAPES, pool, dict.fromkeys(pool, 1.0)).decide(EdgeRequest(asked.edge[0], 3, None))
    assert now is not None
    assert Price("memory", explain.MORE_BYTES, "local", 16, 4, 1.0).in_words(now, 1.0) == "1 GB more: nothing"
    assert Price("deadline", explain.MORE_SECONDS, "local", 16, 4, 1.0).in_words(now, 1.0) == "10.0 s more: nothing"


def test_steps_that_fill_a_round_are_told_and_until_when() -> None:
    slow, fast, fastest = ({"flops": flops, "bandwidth": 1e8, "latency": 0.0} for flops in (1e8, 2e8, 1e12))
    by_slowest = planned(config([slow, fast, fastest], {"steps": "fill"})).edges
    assert [edge.why.rpartition("; ")[2] for edge in by_slowest] == [
        "no limit binds", f"{by_slowest[1].num_steps} steps where 3 are asked, until edge-0, the slowest, is done",
        "24 steps where 3 are asked, the most",
    ]  # fmt: skip
    (by_deadline,) = planned(config([fast], {"steps": "fill", "round_deadline": 2.5})).edges
    assert by_deadline.num_steps > 3
    assert by_deadline.why.endswith(f"{by_deadline.num_steps} steps where 3 are asked, until the deadline")


def test_an_edge_without_declared_speed_is_told_that_no_time_counts_its_computing() -> None:
    words = "it declares no flops: no time here counts its computing"
    assert words in plan(None, 0.5, flops=None).why
    assert words in plan(None, None, flops=None).why
    assert words not in plan(None, 3.0).why
    assert words not in plan(None, None, flops=None, bandwidth=None, latency=None).why
