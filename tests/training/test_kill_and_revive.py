"""Kill-and-Revive on a whole base: the same sets and the same adapters as when it is written out, and going on where it stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atoll.adapters.attach import attached
from atoll.adapters.killed import Killed
from atoll.adapters.state import AdapterState
from atoll.errors import AdapterFitError
from atoll.federated.flower import RecordDict
from atoll.federated.payload import get_statistics, put_statistics
from atoll.selection.schedule import Schedule
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, ModuleStatistics, TrainState, Update

from tests.conftest import random_model
from tests.pieces import HOW_KILLED, adapters, selector, stream, trainer
from tests.training.naive import kill_and_revive

STEPS, WINDOW, PERIOD = 14, 2, 6
SCHEDULE = Schedule(WINDOW, PERIOD, ever=True)


def engine(state: AdapterState, schedule: Schedule = SCHEDULE, **select: object) -> LocalTrainer:
    select = {"policy": "kill-and-revive", "variation": "change", "keep": 0.2} | select
    return replace(trainer(total_steps=STEPS, schedule="constant"), selector=selector(state, schedule, **select))


def fit(one: LocalTrainer, state: TrainState, steps: int = STEPS) -> Update:
    return one.fit(state, stream(), FitPlan(steps, 1, False), lambda report: None)


def sets(update: Update) -> list[frozenset[str]]:
    return [frozenset(report.active) for report in update.reports]


def difference(a: AdapterState, b: AdapterState) -> float:
    flat = [torch.cat([t.flatten() for m in state.modules.values() for t in (m.down_RI, m.up_OR)]) for state in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


@pytest.mark.parametrize("variation", ["change", "gradient"])
@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize(("kind", "killed"), HOW_KILLED)
def test_it_is_what_is_written_out(kind: str, killed: str, moments: str, variation: str) -> None:
    start = adapters(random_model("llama"), kind)
    one = engine(start, killed=killed, killed_moments=moments, variation=variation)
    assert one.selector is not None
    ours = fit(one, TrainState(start, {}, 0))
    size = max(1, int(0.2 * len(start.modules)))
    theirs, told = kill_and_revive(
        random_model("llama"), start, stream(), lambda scores: sorted(scores, key=scores.__getitem__)[-size:], steps=STEPS, window=WINDOW,
        period=PERIOD, killed=killed, learning_rate=1e-2, reset=moments == "reset",
        variation=variation,
    )  # fmt: skip
    assert sets(ours) == [frozenset(active) for active in told]
    if variation == "change":
        assert len({active for active in sets(ours) if len(active) == size}) > 1, "a second choice that is another"
    assert difference(theirs, ours.state.adapter) < 2e-4
    assert difference(start, ours.state.adapter) > 1e-2


@pytest.mark.parametrize("stops", [(1, 3), (2, 6), (5, 9), (8, 14)])
@pytest.mark.parametrize("policy", ["kill-and-revive", "snip", "magnitude", "random"])
def test_stopping_anywhere_and_going_on(policy: str, stops: tuple[int, int]) -> None:
    """Also within a window, and at its end, with the statistics going through the records of an edge's context."""
    start = adapters(random_model("llama"))
    schedule = {"kill-and-revive": SCHEDULE, "random": Schedule(0, None, ever=True)}.get(policy, Schedule(WINDOW, None, ever=True))
    one = engine(start, schedule, policy=policy)
    whole = fit(one, TrainState(start, {}, 0))
    now, reports = TrainState(start, {}, 0), ()
    record = RecordDict()
    for stop in (*stops, STEPS):
        update = fit(one, now, stop - now.step)
        put_statistics(record, update.state.statistics)
        now, reports = replace(update.state, statistics=get_statistics(record)), (*reports, *update.reports)
    assert sets(whole) == [frozenset(report.active) for report in reports]
    assert difference(whole.state.adapter, now.adapter) < 1e-6
    changes, expected = ([report.active_change for report in some if report.active_change] for some in (reports, whole.reports))
    assert changes == pytest.approx(expected)


@pytest.mark.parametrize("stops", [(1, 3), (2, 8)])
def test_a_lottery_goes_on_with_the_lots_that_it_would_have_drawn(stops: tuple[int, int]) -> None:
    start = adapters(random_model("llama"))
    one = engine(start, draw="lottery", keep=0.15)
    whole = fit(one, TrainState(start, {}, 0))
    now, reports = TrainState(start, {}, 0), ()
    for stop in (*stops, STEPS):
        update = fit(one, now, stop - now.step)
        now, reports = update.state, (*reports, *update.reports)
    assert sets(whole) == [frozenset(report.active) for report in reports]
    assert len(set(sets(whole))) == 3, "the whole pool, and two draws"
    assert sets(whole) != sets(fit(engine(start, keep=0.15), TrainState(start, {}, 0)))
    assert difference(whole.state.adapter, now.adapter) < 1e-6


def test_an_empty_watch_comes_back_empty() -> None:
    record = RecordDict()
    assert get_statistics(record).chosen is None
    put_statistics(record, ModuleStatistics())
    read = get_statistics(record)
    assert (read.chosen, read.scores, read.moved, read.num_steps) == (None, {}, None, 0)


def test_what_is_told_of_every_change() -> None:
    start = adapters(random_model("llama"))
    reports = fit(engine(start), TrainState(start, {}, 0)).reports
    changes = [(report.step, report.active_change) for report in reports if report.active_change is not None]
    assert [(step, turn.reason) for step, turn in changes] == [
        (0, "window"), (2, "choice"), (6, "window"), (8, "choice"), (12, "window"),
    ]  # fmt: skip
    for _, turn in changes:
        assert set(turn.scores) == (set(start.modules) if turn.reason == "choice" else set())
    first, second = changes[1][1], changes[2][1]
    assert set(second.revived) == set(first.killed)
    assert changes[0][1].revived == ()


def test_killed_modules_do_not_move_and_are_handed_over_once() -> None:
    start = adapters(random_model("llama"))
    update = fit(engine(start), TrainState(start, {}, 0), 5)
    later = fit(engine(start), update.state, 1)
    assert [bool(report.offloaded) for report in update.reports] == [False, False, True, False, False]
    killed = set(start.modules) - set(later.reports[0].active)
    assert set(later.reports[0].offloaded) == killed, "a new fit: the adapters may be others"
    before, after = update.state.adapter.modules, later.state.adapter.modules
    assert all(torch.equal(before[name].up_OR, after[name].up_OR) for name in killed)
    assert all(not torch.equal(before[name].up_OR, after[name].up_OR) for name in later.reports[0].active)


def test_the_base_comes_back_unharmed() -> None:
    start = adapters(random_model("llama"))
    for killed in ("offload", "skip", "merge"):
        one = engine(start, killed=killed)
        digest = one.base.digest()
        fit(one, TrainState(start, {}, 0))
        assert one.base.digest() == digest


def test_what_cannot_be_merged_is_refused() -> None:
    model = random_model("llama")
    state = adapters(model, "bottleneck")
    with pytest.raises(AdapterFitError, match="cannot be merged"), attached(model, state, killed=Killed(tuple(state.modules), "merge")):
        pass
