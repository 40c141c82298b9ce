"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere, or nothing. Always on standard error."""

from __future__ import annotations

import sys
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TextIO

from atoll.report.lines import PhaseClock, describe_event
from atoll.runs.events import EdgeDropped, EdgeFinished, Evaluated, Event, PhaseStarted, RoundStarted, RunFinished, StepDone
from atoll.units import counted, format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_WIDE = 120
"""Columns from which on there is place for a bar beside all that is told."""
Style = Literal["auto", "bars", "lines", "verbose", "silent"]


class Progress:
    """An observer of events; use it as a context manager, so that the terminal is left tidy.

    `style` "auto": bars where `stream` is a terminal, lines elsewhere; "verbose": lines with the seconds since the start, for steps, too,
    and how long each phase took.
    """

    def __init__(self, style: Style = "auto", stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        if style == "auto":
            style = "bars" if self._stream.isatty() else "lines"
        self._lines = style in ("lines", "verbose")
        self._clock = PhaseClock() if style == "verbose" else None
        self._bars = _Bars(self._stream) if style == "bars" else None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._bars is not None:
            self._bars.show(event)
        elif self._clock is not None:
            for line in self._clock.lines(event):
                print(line, file=self._stream, flush=True)
        elif self._lines and (line := describe_event(event)):
            print(line, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.close()


class _Bars:
    """One bar a phase: steps done, round, who of the round's edges answered, loss (running mean), bytes to and from edges, time left.

    Above it the lines that a pipe gets. Of edges on machines of their own no step is seen: their steps are done when they answer.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: RichProgress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._round = ""
        self._loss: float | None = None
        self._num_bytes = 0
        self._is_wide = True
        self._asked: tuple[str, ...] = ()
        self._answered: set[str] = set()
        self._dropped: set[str] = set()
        self._seen: Counter[str] = Counter()
        """Steps of the round, by edge."""

    def show(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self._begin(event)
        elif line := describe_event(event):
            self._opened().console.print(line, highlight=False, markup=False, emoji=False)
        if isinstance(event, RoundStarted):
            self._round = f"round {event.round}/{event.rounds}"
            self._asked, self._answered, self._dropped = event.edges, set(), set()
            self._seen.clear()
            self._update(0)
        elif isinstance(event, StepDone):
            self._seen[event.edge] += 1
            self._update(1, event.loss)
        elif isinstance(event, EdgeFinished):
            unseen = max(0, event.num_steps - self._seen[event.edge])
            self._answered.add(event.edge)
            self._num_bytes += event.up_bytes + event.down_bytes
            self._update(unseen, event.mean_loss if unseen else None)
        elif isinstance(event, EdgeDropped):
            self._answered.discard(event.edge)
            self._dropped.add(event.edge)
            self._update(0)
        if isinstance(event, RunFinished | Evaluated):
            self._end_of_phase()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _begin(self, event: PhaseStarted) -> None:
        self._end_of_phase()
        self._phase, self._round, self._loss, self._num_bytes = event.phase, "", None, 0
        # An evaluation says nothing until it is done: a bar that swings, not one that stands at 0.
        total = None if event.phase == "evaluate" else event.total_steps or None
        rows = counted(event.total_steps, "row") if total is None and event.phase == "evaluate" and event.total_steps else ""
        self._task = self._opened().add_task(event.phase, total=total, detail=rows)

    def _end_of_phase(self) -> None:
        """Let the bar that is open stand as finished."""
        progress = self._opened()
        if self._task is not None:
            task = next(task for task in progress.tasks if task.id == self._task)
            if task.total is None:  # an evaluation: its scores are printed above the bars
                progress.remove_task(self._task)
            else:
                progress.update(self._task, total=task.completed or 1, completed=task.completed or 1)
            self._task = None

    def _update(self, steps: int, loss: float | None = None) -> None:
        if self._task is None:
            return
        if loss is not None:
            # A single batch's loss jumps; the mean over some ten steps shows where it goes.
            self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        shown = "" if self._loss is None else f"loss {self._loss:.3f}"
        num_bytes = format_bytes(self._num_bytes) if self._num_bytes else ""
        parts = (self._round, self._edges(), shown, num_bytes)
        self._opened().update(self._task, advance=steps, detail="  ".join(part for part in parts if part))

    def _edges(self) -> str:
        if len(self._asked) < 2:
            return ""
        missing = f", {len(self._dropped)} dropped" if self._dropped else ""
        return f"{len(self._answered)} of {counted(len(self._asked), 'edge')}{' answered' if self._is_wide else ''}{missing}"

    def _opened(self) -> RichProgress:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress
            from rich.text import Text

            class Count(MofNCompleteColumn):
                """Nothing of what is not counted."""

                def render(self, task: Task) -> Text:
                    return Text("") if task.total is None else super().render(task)

            console = Console(file=self._stream, emoji=False, markup=False, highlight=False)
            self._is_wide = console.width >= _WIDE
            words = [Count(), TextColumn("{task.fields[detail]}", markup=False)]
            # On a narrow terminal numbers come before the bar.
            around = ([BarColumn()], [TimeElapsedColumn(), TextColumn("left")]) if self._is_wide else ([], [])
            columns = [TextColumn("{task.description}", markup=False), *around[0], *words, *around[1], TimeRemainingColumn()]
            self._progress = RichProgress(*columns, console=console, refresh_per_second=4, expand=self._is_wide)
            self._progress.start()
        return self._progress
