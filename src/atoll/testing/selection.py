"""Checks of policies: every choice is a set of modules of the pool, the same for the same scores, at the times that the schedule says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import get_args

from atoll.config.schema import Select, Wire
from atoll.errors import PartError
from atoll.selection.policy import ScoreKind
from atoll.selection.pool import PoolModule
from atoll.selection.schedule import Schedule
from atoll.selection.selector import ModuleSelector, StepTokens
from atoll.testing.law import Subject

_SIZES = (1, 2, 7, 40)
_SHARES = (0.05, 0.5, 1.0)
_EPOCHS = (1, 10, 500)


def check_policy(subject: Subject) -> None:
    """Raises: BrokenLaw."""
    select = Select(policy=subject.name, observe_steps=2, every=20)
    measured = subject.make().measures(select)
    subject.expect(measured is None or measured in get_args(ScoreKind), f"measures is None or one of {get_args(ScoreKind)}: {measured!r}")
    for epoch_steps in _EPOCHS:
        _check_schedule(subject, select, measured, epoch_steps)
    for size in _SIZES:
        for keep in _SHARES:
            _check_choices(subject, select.model_copy(update={"keep": keep}), _pool(size))


def _check_schedule(subject: Subject, select: Select, measured: str | None, epoch_steps: int) -> None:
    schedule = subject.make().schedule(select, epoch_steps)
    subject.expect(isinstance(schedule, Schedule), f"schedule gives a Schedule, not {type(schedule).__name__}")
    subject.expect(schedule == subject.make().schedule(select, epoch_steps), "the same epoch gives the same schedule")
    subject.expect(schedule.ever != subject.trait("trains_all"), "trains_all is said by those, and only those, that never choose")
    subject.expect((measured is None) == (schedule.window_steps == 0), "there is a window where something is measured, and nowhere else")
    observes = measured is not None
    subject.expect(subject.trait("observes") == observes, f"observes = {observes} belongs into its class")
    repeats = schedule.period_steps is not None
    subject.expect(subject.trait("repeats") == repeats, f"repeats = {repeats} belongs into its class")


def _check_choices(subject: Subject, select: Select, pool: tuple[PoolModule, ...]) -> None:
    schedule = subject.make().schedule(select, 500)
    selector = ModuleSelector(select, pool, schedule, 7, 8, Wire(), keeps_back=False, options=subject.options)
    for number, scores in enumerate(_scores(len(pool))):
        given = dict(zip((module.name for module in pool), scores, strict=True))
        try:
            first, again = (selector.choose(dict(given), StepTokens(64, 16), 2) for _ in range(2))
        except PartError as problem:
            subject.expect(False, f"a choice has at least one module, all of the pool: {problem.got}")
            return
        subject.expect(first == again, f"the same scores give the same choice, and not {first} and then {again} (case {number})")


def _pool(size: int) -> tuple[PoolModule, ...]:
    """Two modules at a place; of unequal sizes, the first in front of the host's blocks, the last behind them."""
    return tuple(
        PoolModule(f"blocks.{n // 2}.m{n % 2}", (n // 2, 0), (8, 8 + n % 3, 2), remote=0 < n < size - 1, front=n == 0) for n in range(size)
    )  # fmt: skip


def _scores(size: int) -> list[Sequence[float]]:
    draw = random.Random(size)
    drawn = [draw.random() for _ in range(size)]
    return [drawn, drawn[::-1], [0.0] * size, [1.0] * size, [value * 1e30 for value in drawn], [value * 1e-30 for value in drawn]]
