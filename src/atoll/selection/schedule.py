"""When all modules are observed, and when it is decided which of them stay active: from step numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from atoll.config.schema import Select
from atoll.errors import ConflictError

_LEAST_AUTO_STEPS = 10
_EPOCH_PARTS = 50
"""An automatic window is one of so many equal parts of an epoch: 2 %."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of one edge, counted from 0 over all rounds: windows with every module active, and choices at their ends."""

    window_steps: int
    """0: no window."""
    period_steps: int | None
    """From the beginning of a window to that of the next; None: one choice only."""
    ever: bool
    """False: nothing is ever chosen."""

    @classmethod
    def never(cls) -> Self:
        """Every module, all the time."""
        return cls(0, None, ever=False)

    @classmethod
    def at_start(cls) -> Self:
        """A choice before the first step, by nothing that is observed."""
        return cls(0, None, ever=True)

    @classmethod
    def once(cls, window_steps: int) -> Self:
        """One window, and one choice at its end."""
        return cls(window_steps, None, ever=True)

    @classmethod
    def periodic(cls, window_steps: int, period_steps: int) -> Self:
        """A window at the beginning of every period, and a choice at its end."""
        return cls(window_steps, period_steps, ever=True)

    def observes(self, step: int) -> bool:
        """Whether this step is in a window."""
        return self.ever and self._place(step) < self.window_steps

    def decides(self, steps_done: int) -> bool:
        """Whether a choice is due after so many steps: at the end of a window, or before the first step where there is none."""
        return self.ever and self._place(steps_done) == self.window_steps

    def until(self, step: int) -> int | None:
        """The first later step at which the active set may differ; None: never."""
        if not self.ever:
            return None
        if self.observes(step):
            return step - self._place(step) + self.window_steps
        return None if self.period_steps is None else step - self._place(step) + self.period_steps

    def full_pool_share(self, total_steps: int) -> float:
        """Share of the first so many steps that are in windows."""
        if not self.ever or total_steps <= 0:
            return 0.0
        periods, rest = (0, total_steps) if self.period_steps is None else divmod(total_steps, self.period_steps)
        return (periods * self.window_steps + min(rest, self.window_steps)) / total_steps

    def _place(self, step: int) -> int:
        """Steps since the last window began."""
        return step if self.period_steps is None else step % self.period_steps


def window_steps(select: Select, epoch_steps: int) -> int:
    """Steps of a window, as [select] observe_steps says; "auto": 10, or 2 % of an epoch where that is more."""
    auto_steps = max(_LEAST_AUTO_STEPS, -(-epoch_steps // _EPOCH_PARTS))
    return auto_steps if select.observe_steps == "auto" else select.observe_steps


def check_schedule(schedule: Schedule, select: Select, edge: str = "") -> None:
    """Whether anything is ever killed.

    Raises: ConflictError where a window is no shorter than its period.
    """
    if schedule.period_steps is not None and schedule.window_steps >= schedule.period_steps:
        raise _endless(select, schedule.window_steps, schedule.period_steps, edge)


def _endless(select: Select, window_steps: int, period_steps: int, edge: str) -> ConflictError:
    by_itself = " (auto)" if select.observe_steps == "auto" else ""
    epoch = f"an epoch has {period_steps} {'step' if period_steps == 1 else 'steps'}"
    period = epoch if select.every == "epoch" else f"every = {period_steps}"
    shorter = f"observe_steps = {max(1, (period_steps - 1) // 8)} or " if period_steps > 1 else ""
    return ConflictError(
        "a window of observation is no shorter than its period, so that no module would ever be killed",
        where="[select]" + (f", edge {edge}" if edge else ""), got=f"observe_steps = {window_steps}{by_itself}; {period}",
        expected="fewer steps in a window than from one window to the next",
        do=f"write {shorter}every = {8 * window_steps + 1} or more below [select]; or policy = \"early-kill\", which observes once",
    )  # fmt: skip
