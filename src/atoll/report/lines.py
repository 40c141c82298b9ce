"""One plain line for an event; "" for events that come too often for lines."""

from __future__ import annotations

import time
from collections.abc import Callable

from atoll.runs.events import (
    Advised,
    DataLoaded,
    EdgeDropped,
    EdgeFinished,
    EdgeLeftOut,
    Evaluated,
    Event,
    HostLost,
    ImportanceFound,
    ModulesChosen,
    PhaseStarted,
    Resumed,
    RoundFinished,
    RunFinished,
    RunStarted,
    StepDone,
)
from atoll.units import counted, format_bytes, format_seconds


def describe_event(event: Event) -> str:
    """One line for people; one a round and phase, none for steps."""
    match event:
        case RunStarted():
            edges = f"{counted(len(event.edges), 'edge')} ({', '.join(event.edges)})"
            return f"run {event.name}: {edges}, {counted(event.rounds, 'round')}, seed {event.seed}"
        case Resumed():
            return f"goes on after round {event.round}" if event.round else "begins again"
        case DataLoaded():
            return _data(event)
        case PhaseStarted():
            unit = "row" if event.phase == "evaluate" else "step"
            return f"{event.phase}: {counted(event.total_steps, unit)}" if event.total_steps else event.phase
        case EdgeFinished():
            return _edge(event)
        case EdgeDropped():
            return f"round {event.round}: edge {event.edge} dropped: {event.reason}"
        case EdgeLeftOut():
            return f"edge {event.edge} is left out: {event.reason}"
        case ImportanceFound():
            most = sorted(event.scores, key=lambda name: -event.scores[name])[:3]
            found = f"importance of {counted(len(event.scores), 'weight')} found by {counted(len(event.edges), 'edge')}"
            return f"{found}; the most: {', '.join(most)}"
        case Advised():
            return f"edge {event.edge}: {event.advice}" if event.edge else event.advice
        case ModulesChosen() if event.reason == "choice":
            kept = f"{len(event.active)} of {counted(len(event.active) + len(event.killed), 'module')} stay active"
            return f"{event.phase} round {event.round}: {event.edge}, step {event.step}: {kept}"
        case HostLost():
            return f"edge {event.edge}: host lost: {event.reason}"
        case RoundFinished():
            moved = f"up {format_bytes(event.up_bytes)}, down {format_bytes(event.down_bytes)}, {format_seconds(event.seconds)}"
            simulated = "" if event.simulated_seconds is None else f" ({format_seconds(event.simulated_seconds)} simulated)"
            return f"{event.phase} round {event.round}: {counted(len(event.edges), 'update')}, {moved}{simulated}"
        case Evaluated():
            return f"{event.row}: " + ", ".join(
                f"{name} {value:.4g}" for name, value in event.metrics.items() if not name.startswith("num_")
            )
        case RunFinished():
            return f"{event.status} after {format_seconds(event.seconds)}"
        case _:
            return ""


class PhaseClock:
    """The same lines with the seconds since it was made before each, and lines for steps and for how long each phase took."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._begun, self._phase, self._phase_begun = now, now(), "", now()

    def lines(self, event: Event) -> list[str]:
        """What an event is worth saying."""
        found = []
        if isinstance(event, PhaseStarted | RunFinished):
            if self._phase:
                found.append(f"{self._phase} took {format_seconds(self._now() - self._phase_begun)}")
            self._phase, self._phase_begun = event.phase if isinstance(event, PhaseStarted) else "", self._now()
        said = _step(event) if isinstance(event, StepDone) else describe_event(event)
        return [f"{self._now() - self._begun:7.1f} s  {line}" for line in [*found, *([said] if said else [])]]


def _step(event: StepDone) -> str:
    rate = f"learning rate {event.learning_rate:.3g}, gradient {event.grad_norm:.3g}"
    done = f"loss {event.loss:.4g}, {rate}, {counted(event.num_tokens, 'token')}, {counted(event.num_active, 'module')}"
    return f"{event.phase} round {event.round}: {event.edge}, step {event.step}, {done}"


def _data(event: DataLoaded) -> str:
    of = f" of {event.edge}" if event.edge else ""
    notes = [f"{event.num_skipped} skipped"] if event.num_skipped else []
    notes += [f"{event.num_truncated} cut to max_length"] if event.num_truncated else []
    size = f"{counted(event.num_rows, 'row')}, {counted(event.num_tokens, 'token')}, {event.num_label_tokens} with loss"
    noted = f" ({', '.join(notes)})" if notes else ""
    return f"{event.role} data{of}: {size}{noted}"


def _edge(event: EdgeFinished) -> str:
    done = f"{counted(event.num_steps, 'step')}, mean loss {event.mean_loss:.4g}"
    moved = f"up {format_bytes(event.up_bytes)}, down {format_bytes(event.down_bytes)}, {format_seconds(event.seconds)}"
    return f"{event.phase} round {event.round}: {event.edge}, {done}, {moved}"
