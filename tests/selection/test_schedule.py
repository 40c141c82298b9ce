"""Windows and choices by step number, against counting step by step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.config.schema import Select
from atoll.errors import ConflictError
from atoll.selection.schedule import Schedule
from atoll.selection.selector import schedule_of

NUM_STEPS = 70


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    if draw(st.booleans()):
        return Schedule(draw(st.integers(0, 12)), None, ever=draw(st.booleans()))
    period_steps = draw(st.integers(2, 30))
    return Schedule(draw(st.integers(1, period_steps - 1)), period_steps, ever=True)


def _active(schedule: Schedule) -> list[tuple[str, int]]:
    """What is trained in every step, by the two questions alone: the pool, or the choice with this number."""
    found, choices = [], 0
    for step in range(NUM_STEPS):
        choices += schedule.decides(step)
        found.append(("pool", 0) if schedule.observes(step) or not choices else ("choice", choices))
    return found


@given(schedules())
def test_a_choice_is_due_exactly_at_the_end_of_a_window(schedule: Schedule) -> None:
    observed = [False, *(schedule.observes(step) for step in range(NUM_STEPS))]
    ends = [before and not after for before, after in itertools.pairwise(observed)]
    if schedule.window_steps == 0:
        ends[0] = schedule.ever
    assert [schedule.decides(step) for step in range(NUM_STEPS)] == ends


@given(schedules())
def test_the_active_set_is_constant_until_the_mark_and_not_after(schedule: Schedule) -> None:
    active = _active(schedule)
    for step in range(NUM_STEPS):
        later = [other for other in range(step + 1, NUM_STEPS) if active[other] != active[step]]
        mark = schedule.until(step)
        assert mark is None or mark > step
        assert (mark if mark is not None and mark < NUM_STEPS else None) == (later[0] if later else None)


@given(schedules(), st.integers(0, NUM_STEPS))
def test_the_share_is_what_counting_gives(schedule: Schedule, total_steps: int) -> None:
    counted = sum(schedule.observes(step) for step in range(total_steps))
    assert schedule.full_pool_share(total_steps) == counted / max(1, total_steps)


@pytest.mark.parametrize(
    ("settings", "window_steps", "period_steps"),
    [
        ({"policy": "kill-and-revive"}, 10, 50),
        ({"policy": "kill-and-revive", "observe_steps": 3}, 3, 50),
        ({"policy": "kill-and-revive", "observe_steps": 3, "every": 4}, 3, 4),
        ({"policy": "kill-and-revive", "every": 11}, 10, 11),
        ({"policy": "early-kill"}, 10, None),
        ({"policy": "magnitude", "observe_steps": 3, "every": 2}, 3, None),
        ({"policy": "snip", "observe_steps": 300}, 300, None),
        ({"policy": "random", "observe_steps": 3}, 0, None),
        ({"policy": "last-layers"}, 0, None),
    ],
)
def test_every_policy_has_its_windows(settings: dict[str, object], window_steps: int, period_steps: int | None) -> None:
    """199 rows at 4 a step are an epoch of 50 steps."""
    assert schedule_of(Select.model_validate(settings), 50) == Schedule(window_steps, period_steps, ever=True)


def test_nothing_is_ever_chosen_where_all_are_active() -> None:
    schedule = schedule_of(Select(observe_steps=3), 100)
    assert not any(schedule.observes(step) or schedule.decides(step) or schedule.until(step) for step in range(NUM_STEPS))


@pytest.mark.parametrize(("epoch_steps", "window_steps"), [(11, 10), (500, 10), (501, 11), (550, 11), (551, 12), (5000, 100)])
def test_an_automatic_window_is_2_percent_of_an_epoch_or_10_steps(epoch_steps: int, window_steps: int) -> None:
    assert schedule_of(Select(policy="kill-and-revive"), epoch_steps).window_steps == window_steps


@pytest.mark.parametrize(
    ("settings", "epoch_steps", "got"),
    [
        ({}, 10, "observe_steps = 10 (auto); an epoch has 10 steps"),
        ({"observe_steps": 20}, 20, "observe_steps = 20; an epoch has 20 steps"),
        ({"every": 9}, 1250, "observe_steps = 25 (auto); every = 9"),
        ({"observe_steps": 1, "every": 1}, 1250, "observe_steps = 1; every = 1"),
    ],
)
def test_a_window_as_long_as_its_period_is_refused(settings: dict[str, object], epoch_steps: int, got: str) -> None:
    with pytest.raises(ConflictError) as caught:
        schedule_of(Select.model_validate({"policy": "kill-and-revive", **settings}), epoch_steps, edge="north")
    assert (caught.value.got, caught.value.exit_status) == (got, 2)
    assert "edge north" in caught.value.where
    assert "every = " in caught.value.do
