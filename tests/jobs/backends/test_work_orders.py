"""Orders cross as text, whole."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace
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
from atoll.wire.byte_formulas import WireMode

COUNT, NAME = st.integers(0, 2**50), st.text(max_size=6)
SECONDS = st.one_of(st.none(), st.floats(0, 1e9))
PLANS = st.builds(
    EdgePlan, name=NAME, mode=st.sampled_from(get_args(Mode)), bits=st.sampled_from([4, 8, 16, 32]), batch_size=COUNT, accumulate=COUNT,
    ranks=st.dictionaries(NAME, COUNT, max_size=3), num_steps=COUNT, gradient_checkpointing=st.booleans(), predicted_peak_bytes=COUNT,
    predicted_seconds=SECONDS, up_bytes=COUNT, down_bytes=COUNT, binding=st.sampled_from(get_args(Binding)), why=st.just(""),
    objective=SECONDS, prices=st.just(()), under_training=st.floats(0, 1),
    warm_up=st.one_of(st.none(), st.builds(WarmUpPlan, COUNT, st.booleans())),
    wire_mode=st.one_of(st.none(), st.sampled_from(get_args(WireMode))), wire_why=st.just(""),
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
    told = replace(PLAN, why="memory binds", wire_why="quickest", prices=(Price("memory", 1.0, "local", 16, 4, 0.5),))
    first, second = (replace(WORK_ORDER, plan=replace(PLAN, ranks=ranks)) for ranks in ({"b": 1, "a": 2}, {"a": 2, "b": 1}))
    assert to_text(replace(WORK_ORDER, plan=told), ["a.b"], [], "run") == to_text(WORK_ORDER, ["a.b"], [], "run")
    assert to_text(first, [], [], "run") == to_text(second, [], [], "run")
    assert to_text(WORK_ORDER, ["a.b"], [], "run") != to_text(replace(WORK_ORDER, rounds_before=1), ["a.b"], [], "run")


TEXT = to_text(WORK_ORDER, ["a.b"], ["yes", "no"], "run")
SENT = json.loads(TEXT)
TOLD, PLANNED = SENT["order"], SENT["order"]["plan"]


def of_order(values: object) -> str:
    return json.dumps({**SENT, "order": values})


def of_plan(values: object) -> str:
    return of_order({**TOLD, "plan": values})


def without(values: dict[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in values.items() if key != name}


REQUIRED = [field.name for field in fields(EdgePlan) if field.default is MISSING]
DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [
    "", "{", "[]", "5", "null", '"text"', "{}", TEXT[:-1], DEEP, TEXT.replace('["a.b"]', DEEP), of_order(None), of_order([]), of_plan(None),
    of_plan([]), of_plan({"warm_up": None}), of_plan({**PLANNED, "warm_up": 5}), of_plan({**PLANNED, "warm_up": {"other": 1}}),
    of_plan({**PLANNED, "mode": "elsewhere"}), of_plan({**PLANNED, "num_steps": "5"}), of_plan({**PLANNED, "num_steps": 5.0}),
    of_plan({**PLANNED, "num_steps": True}), of_plan({**PLANNED, "ranks": {"a.b": float("inf")}}), of_plan({**PLANNED, "ranks": ["a.b"]}),
    json.dumps({**SENT, "pool": None}), json.dumps({**SENT, "pool": [1]}), json.dumps({**SENT, "labels": 7}),
    of_order({**TOLD, "phase": "../state"}), of_order({**TOLD, "phase": ["federated"]}), of_order({**TOLD, "total_steps": None}),
    *(json.dumps(without(SENT, left)) for left in SENT), *(of_order(without(TOLD, left)) for left in TOLD),
    *(of_plan(without(PLANNED, left)) for left in REQUIRED),
])  # fmt: skip
def test_a_damaged_order_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be read") as caught:
        from_text(text)
    assert len(caught.value.got) <= 300


def test_the_field_that_is_wrong_is_named() -> None:
    with pytest.raises(ProtocolError) as caught:
        from_text(of_plan({**PLANNED, "num_steps": "5"}))
    assert caught.value.got == "order.plan.num_steps: Input should be a valid integer"
