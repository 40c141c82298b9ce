"""Orders cross as text, whole."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import ProtocolError
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.work_orders import SentOrder, from_text, to_text
from atoll.planner.edge_plan import EdgePlan, Mode
from atoll.planner.fedpipe.explain import Binding, Price
from atoll.planner.request import WarmUpPlan
from atoll.runs.events import Phase

COUNT, NAME = st.integers(0, 2**50), st.text(max_size=6)
SECONDS = st.one_of(st.none(), st.floats(0, 1e9))
PLANS = st.builds(
    EdgePlan, name=NAME, mode=st.sampled_from(get_args(Mode)), bits=st.sampled_from([4, 8, 16, 32]), batch_size=COUNT, accumulate=COUNT,
    ranks=st.dictionaries(NAME, COUNT, max_size=3), num_steps=COUNT, gradient_checkpointing=st.booleans(), predicted_peak_bytes=COUNT,
    predicted_seconds=SECONDS, up_bytes=COUNT, down_bytes=COUNT, binding=st.sampled_from(get_args(Binding)), why=st.just(""),
    objective=SECONDS, prices=st.just(()), under_training=st.floats(0, 1),
    warm_up=st.one_of(st.none(), st.builds(WarmUpPlan, COUNT, st.booleans())),
)  # fmt: skip
ORDERS = st.builds(WorkOrder, NAME, PLANS, st.sampled_from(get_args(Phase)), COUNT, COUNT)
NAMES = st.lists(NAME, max_size=3).map(tuple)
PLAN = EdgePlan("north", "local", 16, 4, 1, {"a.b": 2}, 5, False, 100, None, 1, 1, "none", "")
WORK_ORDER = WorkOrder("north", PLAN, "federated", 10, 0)


@settings(deadline=None, max_examples=80)
@given(ORDERS, NAMES, NAMES, NAME)
def test_an_order_comes_back_from_its_text(order: WorkOrder, pool: tuple[str, ...], labels: tuple[str, ...], run: str) -> None:
    text = to_text(order, pool, labels, run)
    assert from_text(text) == SentOrder(order, pool, labels, run)
    assert to_text(from_text(text).order, pool, labels, run) == text


def test_every_part_of_a_plan_is_drawn_above() -> None:
    drawn = PLANS.wrapped_strategy if hasattr(PLANS, "wrapped_strategy") else PLANS
    assert set(drawn.kwargs) == {field.name for field in fields(EdgePlan)}  # type: ignore[attr-defined]


def test_equal_orders_are_equal_texts_whatever_people_are_told() -> None:
    told = replace(PLAN, why="memory binds", prices=(Price("memory", 1.0, "local", 16, 4, 0.5),))
    first, second = (replace(WORK_ORDER, plan=replace(PLAN, ranks=ranks)) for ranks in ({"b": 1, "a": 2}, {"a": 2, "b": 1}))
    assert to_text(replace(WORK_ORDER, plan=told), ["a.b"], [], "run") == to_text(WORK_ORDER, ["a.b"], [], "run")
    assert to_text(first, [], [], "run") == to_text(second, [], [], "run")
    assert to_text(WORK_ORDER, ["a.b"], [], "run") != to_text(replace(WORK_ORDER, rounds_before=1), ["a.b"], [], "run")


TEXT = to_text(WORK_ORDER, ["a.b"], ["yes", "no"], "run")
TOLD = json.loads(TEXT)["plan"]


def changed(name: str, value: object) -> str:
    return json.dumps({**json.loads(TEXT), name: value})


@pytest.mark.parametrize("text", [
    "", "{", "[]", "5", "null", '"text"', "{}", TEXT[:-1], changed("plan", None), changed("plan", []), changed("plan", {"warm_up": None}),
    changed("plan", {**json.loads(TEXT)["plan"], "warm_up": 5}), changed("plan", {**json.loads(TEXT)["plan"], "warm_up": {"other": 1}}),
    changed("pool", None), changed("labels", 7), changed("phase", "../state"), changed("phase", ["federated"]),
    *(json.dumps({name: value for name, value in json.loads(TEXT).items() if name != left}) for left in json.loads(TEXT)),
    *(changed("plan", {name: value for name, value in TOLD.items() if name != left}) for left in TOLD),
])  # fmt: skip
def test_a_damaged_order_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        from_text(text)
