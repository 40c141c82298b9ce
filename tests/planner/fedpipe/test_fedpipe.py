"""The planner: what it decides keeps every limit, is as good as trying everything, and is never worse with more."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from atoll.errors import InfeasibleError
from atoll.planner.edge_plan import EdgePlan
from atoll.planner.fedpipe.search import EdgeSearch
from atoll.planner.plan_fleet import plan_fleet
from atoll.planner.request import EdgeRequest

from tests.planner.fedpipe.bases import base
from tests.planner.fedpipe.fleets import RANKS, SHAPES, TARGETS, best_size, by_trying_everything, config, keeps_limits, planned, setting

SPEED = {"flops": 1.5e8, "bandwidth": 1e7, "latency": 0.01}
LEAST, MOST = 4_000_000, 4_700_000
"""Bytes: from too little for anything to enough for everything on the base of two blocks."""
POOL = [module.name for module in SHAPES.modules if module.last_name in TARGETS]


def edge(memory: float | None = None, **fields: Any) -> dict[str, Any]:
    return {**({} if memory is None else {"memory": int(memory)}), **fields}


def only(edges: list[dict[str, Any]], plan: dict[str, Any] | None = None, seed: int = 0, **sections: dict[str, Any]) -> EdgePlan:
    (found,) = planned(config(edges, plan or {}, **sections), seed=seed).edges
    return found


def memory_of(mode: str, bits: int, ranks: dict[str, int], batch: int, again: bool = False, **sections: dict[str, Any]) -> int:
    return setting(config([{}], **sections), SHAPES, mode, bits, ranks, batch, again).peak_bytes


@given(
    seed=st.integers(0, 10**6), memory=st.integers(LEAST, MOST) | st.none(), deadline=st.floats(0.5, 3.0) | st.none(),
    latency=st.sampled_from([0.0, 0.01]), front=st.sampled_from([0, 1]), depth=st.sampled_from(["all", 1]),
)  # fmt: skip
@settings(max_examples=14, deadline=None)
def test_a_plan_is_as_good_as_trying_everything(
    seed: int, memory: int | None, deadline: float | None, latency: float, front: int, depth: str | int
) -> None:
    model = {"cut": {"front": front, "back": 0}}
    asked = config([edge(memory, **SPEED | {"latency": latency})], {"round_deadline": deadline, "depth": depth}, model=model)
    expected = by_trying_everything(asked, SHAPES, seed)
    if expected is None:
        with pytest.raises(InfeasibleError):
            planned(asked, seed=seed)
        return
    (found,) = planned(asked, seed=seed).edges
    assert (found.mode, found.bits) == expected[:2]
    assert found.objective == pytest.approx(expected[2], rel=1e-5)
    assert (found.gradient_checkpointing, found.batch_size) == best_size(asked, SHAPES, found, found.wire_mode or "dense")


@given(seed=st.integers(0, 10**6), memory=st.integers(4_200_000, 8_000_000), deadline=st.floats(3.0, 30.0), rows=st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_a_plan_never_breaks_its_budget(seed: int, memory: int, deadline: float, rows: int) -> None:
    shapes = base(6)
    asked = config(
        [edge(memory, **SPEED)], {"round_deadline": deadline, "ranks": (2, 4, 8, 16)}, train={"batch_size": rows},
        adapter={"targets": "all-linear"},
    )  # fmt: skip
    try:
        (found,) = planned(asked, shapes, seed).edges
    except InfeasibleError:
        return
    one = setting(asked, shapes, found.mode, found.bits, found.ranks, found.batch_size, found.gradient_checkpointing)
    assert found.predicted_peak_bytes == one.peak_bytes <= memory
    assert found.predicted_seconds is not None
    assert found.predicted_seconds <= deadline * (1 + 1e-12)
    assert found.batch_size * found.accumulate >= rows


@given(
    seed=st.integers(0, 10**6), memory=st.integers(LEAST, MOST), deadline=st.floats(0.5, 3.0), more=st.floats(0.0, 0.5),
    steps=st.sampled_from(["asked", "fill"]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_more_of_a_limit_never_makes_a_plan_worse(seed: int, memory: int, deadline: float, more: float, steps: str) -> None:
    def worth(share: float, longer: float) -> float | None:
        try:
            return only([edge(memory * (1 + share), **SPEED)], {"round_deadline": deadline * (1 + longer), "steps": steps}, seed).objective
        except InfeasibleError:
            return None

    now, wider, longer, both = worth(0, 0), worth(more, 0), worth(0, more), worth(more, more)
    assume(now is not None)
    for less, more_of_it in ((now, wider), (now, longer), (wider, both), (longer, both)):
        assert less is not None
        assert more_of_it is not None
        assert more_of_it >= less * (1 - 1e-5)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_base_stays_in_the_bits_that_are_worth_most(bits: int) -> None:
    # Room for everything in so many bits, and not in more.
    memory = memory_of("local", bits, dict.fromkeys(POOL, max(RANKS)), 1)
    found = only([edge(memory, mode="local")], train={"batch_size": 4, "local_steps": 3, "gradient_checkpointing": False})
    assert (found.mode, found.bits) == ("local", bits)
    assert found.objective == pytest.approx({16: 1.0, 8: 0.9994, 4: 0.913}[bits])


def test_a_base_of_few_bits_with_all_weights_is_worth_more_than_one_of_many_bits_with_few_weights() -> None:
    few = memory_of("local", 16, {POOL[-1]: 1}, 1)
    found, wide = only([edge(few, mode="local")]), only([edge(few, bits=16, mode="local")])
    assert (wide.bits, len(wide.ranks)) == (16, 1)
    assert found.bits < 16
    assert (found.objective or 0.0) > (wide.objective or 1.0)


def test_more_memory_never_makes_a_plan_worse_on_the_way_from_a_host_to_the_whole_base() -> None:
    shapes = base(6)
    pool = [module.name for module in shapes.modules if module.last_name in TARGETS]
    least, most = (
        setting(config([{}]), shapes, mode, bits, ranks, 1, False).peak_bytes
        for mode, bits, ranks in (("split", 32, {pool[-1]: 1}), ("local", 4, dict.fromkeys(pool, max(RANKS))))
    )
    plans = [planned(config([edge(least + (most - least) * number / 20)]), shapes).edges[0] for number in range(21)]
    worth, modes = [plan.objective or 0.0 for plan in plans], [plan.mode for plan in plans]
    assert worth == sorted(worth)
    assert (modes[0], modes[-1], sorted(modes, reverse=True)) == ("split", "local", modes)
    assert "4 bits here would be worth" in plans[modes.index("local") - 1].why, "what fits here and is worth less is told"


def test_an_edge_that_can_hold_nothing_goes_to_a_host() -> None:
    least = memory_of("split", 32, {POOL[-1]: 1}, 1)
    assert least < memory_of("local", 4, {POOL[-1]: 1}, 1, again=True), "the base of this test does not tell places apart"
    assert only([edge(least)]).mode == "split"


def test_where_rounds_are_filled_recomputation_has_a_price() -> None:
    everything = dict.fromkeys(POOL, max(RANKS))
    memory, fields = memory_of("local", 16, everything, 1) - 1, {"bits": 16, "mode": "local", "flops": 1e9}
    assert memory >= memory_of("local", 16, everything, 1, again=True)
    asked, filled = only([edge(memory, **fields)]), only([edge(memory, **fields)], {"steps": "fill"})
    assert (asked.gradient_checkpointing, filled.gradient_checkpointing) == (True, False)
    assert (asked.objective, asked.ranks) == (pytest.approx(1.0), everything)
    assert (2 / 3) ** 3 < (filled.objective or 0.0) < 1.0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_recomputing_where_rounds_are_filled_costs_worth_that_teaches_as_much_as_the_steps_it_loses(share: float) -> None:
    """A step takes 3 passes in place of 2, and teaches as the cube root of worth."""
    least, most = (memory_of("local", 16, ranks, 1, again=True) for ranks in ({POOL[-1]: 1}, dict.fromkeys(POOL, max(RANKS))))
    one = edge(least + share * (most - least), bits=16, mode="local", flops=1e9)

    def worth(checkpointing: str | bool) -> float:
        try:
            return only([one], {"steps": "fill"}, train={"batch_size": 4, "gradient_checkpointing": checkpointing}).objective or 0.0
        except InfeasibleError:
            return 0.0

    assert worth(True) > 0.0
    assert worth("auto") == pytest.approx(max(worth(False), worth(True)), rel=1e-5)
    assert worth(True) <= (2 / 3) ** 3 * (1 + 1e-9)


def test_an_edge_without_limits_gets_everything() -> None:
    found = only([{}])
    assert (found.mode, found.bits, found.batch_size, found.accumulate, found.gradient_checkpointing) == ("local", 16, 4, 1, False)
    assert found.ranks == dict.fromkeys(POOL, max(RANKS))
    assert (found.objective, found.binding, found.prices) == (pytest.approx(1.0), "none", ())


def test_ranks_come_before_rows_and_rows_before_nothing() -> None:
    everything = dict.fromkeys(POOL, max(RANKS))
    for batch in (1, 2, 4):
        found = only([edge(memory_of("local", 16, everything, batch), bits=16, mode="local")], train={
            "batch_size": 4, "local_steps": 3, "gradient_checkpointing": False,
        })  # fmt: skip
        assert found.ranks == everything
        assert (found.batch_size, found.accumulate) == (batch, 4 // batch)


def test_checkpointing_makes_room_only_where_it_may() -> None:
    everything = dict.fromkeys(POOL, max(RANKS))
    memory = memory_of("local", 16, everything, 1, again=True)
    assert memory < memory_of("local", 16, everything, 1)
    with_it = only([edge(memory, bits=16, mode="local")])
    assert (with_it.gradient_checkpointing, with_it.ranks) == (True, everything)
    without = only([edge(memory, bits=16, mode="local")], train={"batch_size": 4, "local_steps": 3, "gradient_checkpointing": False})
    assert not without.gradient_checkpointing
    assert (without.objective or 0.0) < 1.0
    forced = only([{}], train={"batch_size": 4, "local_steps": 3, "gradient_checkpointing": True})
    assert forced.gradient_checkpointing


def test_rows_that_do_not_divide_a_step_do_not_break_the_deadline() -> None:
    # Five rows in micro-batches of 4 are eight.
    train = {"batch_size": 5, "local_steps": 3}
    slow = edge(flops=1e9)
    five = only([slow], train=train, plan={"batch_sizes": (1,)}).predicted_seconds
    found = only([slow], train=train, plan={"batch_sizes": (1, 4), "round_deadline": five})
    assert (found.batch_size, found.accumulate) == (1, 5)
    assert found.predicted_seconds == five


def test_with_a_host_more_rows_save_the_round_trips_that_a_deadline_does_not_allow() -> None:
    far = edge(latency=0.05, mode="split")
    train = {"batch_size": 4, "local_steps": 3}
    quick = only([far], train=train).predicted_seconds
    assert quick is not None
    found = only([far], train=train, plan={"round_deadline": quick})
    assert (found.batch_size, found.ranks) == (4, dict.fromkeys(POOL, max(RANKS)))
    with pytest.raises(InfeasibleError):
        only([far], train=train, plan={"round_deadline": quick / 4, "batch_sizes": (1,)})


def test_edges_of_one_kind_get_equal_plans() -> None:
    kinds = [edge(4_700_000, **SPEED), edge(4_400_000, **SPEED)]
    plans = planned(config([kinds[0], kinds[1], kinds[0], kinds[1]], {"round_deadline": 3.0})).edges
    nameless = [dataclasses.replace(plan, name="") for plan in plans]
    assert nameless[0] == nameless[2] != nameless[1] == nameless[3]


def test_what_an_edge_asks_for_is_kept() -> None:
    fleet = planned(config([edge(bits=8), edge(bits=4), edge(mode="split"), edge(rank=2), edge(mode="cloud")]))
    assert [(plan.mode, plan.bits) for plan in fleet.edges[:3]] == [("local", 8), ("local", 4), ("split", 32)]
    assert set(fleet.edges[3].ranks.values()) == {2}
    assert fleet.edges[4].mode == "cloud"


def test_bits_that_run_toml_fixes_are_kept() -> None:
    least = memory_of("local", 4, {POOL[-1]: 1}, 1)
    assert only([{}], model={"quantize": 8}).bits == 8
    with pytest.raises(InfeasibleError, match="nothing fits 1 of 1 edge"):
        only([edge(least, mode="local")], model={"quantize": 16})


def test_bf16_halves_what_is_not_kept_in_fewer_bits() -> None:
    model = {"precision": "bf16"}
    half, single = only([edge(mode="split")], model=model), only([edge(mode="split")])
    assert (half.bits, single.bits) == (16, 32)
    assert only([edge(mode="local")], model=model).bits == 16
    assert half.predicted_peak_bytes < single.predicted_peak_bytes


def test_weights_that_may_be_merged_are_counted() -> None:
    select = {"policy": "kill-and-revive", "killed": "merge"}
    merged, plain = only([edge(mode="local")], select=select), only([edge(mode="local")])
    weights = sum(module.num_weights for module in SHAPES.modules if module.name in POOL)
    assert merged.predicted_peak_bytes - plain.predicted_peak_bytes == 4 * weights
    fewer = only([edge(merged.predicted_peak_bytes - 1, mode="local")], select=select)
    assert fewer.predicted_peak_bytes < merged.predicted_peak_bytes


def test_what_is_equally_important_is_planned_without_importance() -> None:
    asked = config([edge(4_400_000)], {"importance": "none"})
    found = plan_fleet(asked, SHAPES, None)
    assert found.importance == "none"
    assert found.edges[0].warm_up is None
    assert plan_fleet(config([edge(4_400_000)]), SHAPES, None).importance == "unknown", "until a warm-up says more"


def test_a_fleet_that_nothing_fits_is_refused_with_all_its_edges_and_what_each_place_lacks() -> None:
    with pytest.raises(InfeasibleError) as refusal:
        planned(config([edge(1_000_000), edge(), edge(2_000_000)]))
    assert refusal.value.what == "nothing fits 2 of 3 edges"
    assert refusal.value.where == "[[edge]] edge-0, [[edge]] edge-2"
    assert refusal.value.got == "edge-0 declares 1 MB of memory; edge-2 declares 2 MB of memory"
    assert [line.partition(":")[0] for line in refusal.value.expected.splitlines()] == ["edge-0", "edge-2"]
    for place in ("16 bits here", "8 bits here", "4 bits here", "a host for its blocks"):
        assert str(refusal.value.expected).count(f"{place} would need at least") == 2
    assert 'infeasible = "leave-out"' in str(refusal.value.do)


def test_a_fleet_may_leave_out_those_that_nothing_fits() -> None:
    fleet = planned(config([edge(1_000_000), edge()], {"infeasible": "leave-out"}))
    assert [plan.name for plan in fleet.edges] == ["edge-1"]
    assert [left.name for left in fleet.left_out] == ["edge-0"]
    with pytest.raises(InfeasibleError):
        planned(config([edge(1_000_000)], {"infeasible": "leave-out"}))


@given(memory=st.integers(3_000_000, LEAST))
@settings(max_examples=6, deadline=None)
def test_what_a_place_is_said_to_lack_is_the_least_that_makes_it_fit(memory: int) -> None:
    asked = config([edge(memory, mode="local", bits=4)], {})
    planner = EdgeSearch(asked, SHAPES, POOL, dict.fromkeys(POOL, 1.0))
    one = EdgeRequest(asked.edge[0], 3, None)
    (place,) = planner.places(one.edge)
    lacking = planner.shortage(one, place).memory_bytes
    if planner.decide(one) is not None:
        assert lacking is None
        return
    assert lacking is not None
    wider = one.edge.model_copy(update={"memory": memory + lacking})
    assert planner.decide(dataclasses.replace(one, edge=wider)) is not None
    narrower = one.edge.model_copy(update={"memory": memory + lacking - 1})
    assert planner.decide(dataclasses.replace(one, edge=narrower)) is None


def test_steps_fill_the_time_there_is() -> None:
    fast, slow = edge(flops=4e9), edge(flops=1e9)
    plain = planned(config([fast, slow])).edges
    filled = planned(config([fast, slow], {"steps": "fill", "most_steps": 3.0})).edges
    assert [plan.num_steps for plan in plain] == [3, 3]
    assert [plan.num_steps for plan in filled] == [9, 3]
    by_deadline = planned(config([fast, slow], {"steps": "fill", "round_deadline": 2.0, "most_steps": 100.0})).edges
    assert all(plan.predicted_seconds is not None and plan.predicted_seconds <= 2.0 * (1 + 1e-12) for plan in by_deadline)
    assert by_deadline[0].num_steps > by_deadline[1].num_steps >= 3


def test_rounds_are_filled_only_where_the_speed_is_known() -> None:
    edges = [edge(flops=1e9), edge(bandwidth=1e6), edge()]
    assert [plan.num_steps for plan in planned(config(edges, {"steps": "fill"})).edges] == [3, 3, 3]


def test_an_edge_that_is_cut_off_does_what_it_can_and_says_so() -> None:
    slow = edge(mode="local", flops=5e7)
    late = {"round_deadline": 2.0}
    with pytest.raises(InfeasibleError):
        planned(config([slow], late))
    found = only([slow], late, federated={"late": "cut"})
    assert found.num_steps == 2
    assert found.predicted_seconds is not None
    assert found.predicted_seconds <= 2.0 * (1 + 1e-12)
    assert found.under_training == pytest.approx(1 - found.num_steps / 3)
    assert found.why.startswith("2 of 3 steps, as many as it can do in 2.0 s; ")
    enough = only([edge(mode="local", flops=1e9)], {"round_deadline": 4.0}, federated={"late": "cut"})
    assert (enough.num_steps, enough.under_training) == (3, 0.0), "ranks are cut before steps are"


@pytest.mark.parametrize(("rows", "sizes", "expected"), [(6, (1, 2, 4, 8), 6), (5, (1, 2, 4), 5), (6, (4,), 8), (2, (8,), 8)])
def test_a_step_has_as_many_rows_as_are_asked_for_where_batches_allow_it(rows: int, sizes: tuple[int, ...], expected: int) -> None:
    found = only([edge()], {"batch_sizes": sizes}, train={"batch_size": rows})
    assert found.batch_size * found.accumulate == expected


def test_a_plan_of_many_weights_keeps_its_limits() -> None:
    shapes = base(20)
    asked = config(
        [edge(5_400_000, mode="local", **SPEED), edge(5_300_000, mode="local", **SPEED)], {"round_deadline": 40.0, "ranks": (2, 4, 8, 16)},
        adapter={"targets": "all-linear"},
    )  # fmt: skip
    for number, found in enumerate(planned(asked, shapes).edges):
        one = setting(asked, shapes, found.mode, found.bits, found.ranks, found.batch_size, found.gradient_checkpointing)
        assert keeps_limits(asked, one, found.mode, number)
        assert 0 < (found.objective or 0.0) < 1
