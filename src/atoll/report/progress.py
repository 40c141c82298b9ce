"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere, or nothing. Always on standard error."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TextIO

from atoll.report.lines import describe_event
from atoll.runs.events import EdgeFinished, Evaluated, Event, PhaseStarted, RoundFinished, RoundStarted, RunFinished, StepDone
from atoll.units import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Style = Literal["auto", "bars", "lines", "silent"]


class Progress:
    """An observer of events; use it as a context manager, so that the terminal is left tidy.

    `style` "auto": bars where `stream` is a terminal, lines elsewhere.
    """

    def __init__(self, style: Style = "auto", stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        if style == "auto":
            style = "bars" if self._stream.isatty() else "lines"
        self._lines = style == "lines"
        self._bars = _Bars(self._stream) if style == "bars" else None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._bars is not None:
            self._bars.show(event)
        elif self._lines and (line := describe_event(event)):
            print(line, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.close()


class _Bars:
    """One bar a phase: steps done, round, loss (running mean), bytes to and from edges, time left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: RichProgress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._round = ""
        self._loss: float | None = None
        self._num_bytes = 0

    def show(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self._begin(event)
        elif isinstance(event, RoundStarted):
            self._round = f"round {event.round}/{event.rounds}"
            self._update(0)
        elif isinstance(event, StepDone):
            # A single batch's loss jumps; the mean over some ten steps shows where it goes.
            self._loss = event.loss if self._loss is None else 0.9 * self._loss + 0.1 * event.loss
            self._update(1)
        elif isinstance(event, EdgeFinished):
            self._num_bytes += event.up_bytes + event.down_bytes
            self._update(0)
        elif not isinstance(event, RoundFinished) and (line := describe_event(event)):
            self._opened().console.print(line, highlight=False, markup=False)
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
        self._task = self._opened().add_task(event.phase, total=total, detail="")

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

    def _update(self, steps: int) -> None:
        if self._task is None:
            return
        loss = "" if self._loss is None else f"loss {self._loss:.3f}"
        num_bytes = format_bytes(self._num_bytes) if self._num_bytes else ""
        self._opened().update(self._task, advance=steps, detail="  ".join(part for part in (self._round, loss, num_bytes) if part))

    def _opened(self) -> RichProgress:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = [TextColumn("{task.description:<11}"), BarColumn(bar_width=24), MofNCompleteColumn()]
            columns += [TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
            self._progress = RichProgress(*columns, console=Console(file=self._stream), refresh_per_second=4)
            self._progress.start()
        return self._progress
