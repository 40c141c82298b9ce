"""One plain line for an event; "" for events that come too often for lines."""

from __future__ import annotations

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
)
from atoll.units import format_bytes, format_seconds


def describe_event(event: Event) -> str:
    """One line for people; one a round and phase, none for steps."""
    match event:
        case RunStarted():
            edges = f"{_counted(len(event.edges), 'edge')} ({', '.join(event.edges)})"
            return f"run {event.name}: {edges}, {_counted(event.rounds, 'round')}, seed {event.seed}"
        case Resumed():
            return f"goes on after round {event.round}" if event.round else "begins again"
        case DataLoaded():
            return _data(event)
        case PhaseStarted():
            unit = "row" if event.phase == "evaluate" else "step"
            return f"{event.phase}: {_counted(event.total_steps, unit)}" if event.total_steps else event.phase
        case EdgeFinished():
            return _edge(event)
        case EdgeDropped():
            return f"round {event.round}: edge {event.edge} dropped: {event.reason}"
        case EdgeLeftOut():
            return f"edge {event.edge} is left out: {event.reason}"
        case ImportanceFound():
            most = sorted(event.scores, key=lambda name: -event.scores[name])[:3]
            found = f"importance of {_counted(len(event.scores), 'weight')} found by {_counted(len(event.edges), 'edge')}"
            return f"{found}; the most: {', '.join(most)}"
        case Advised():
            return f"edge {event.edge}: {event.advice}" if event.edge else event.advice
        case ModulesChosen() if event.reason == "choice":
            kept = f"{len(event.active)} of {_counted(len(event.active) + len(event.killed), 'module')} stay active"
            return f"{event.phase} round {event.round}: {event.edge}, step {event.step}: {kept}"
        case HostLost():
            return f"edge {event.edge}: host lost ({event.reason}); trying to reach it again"
        case RoundFinished():
            moved = f"up {format_bytes(event.up_bytes)}, down {format_bytes(event.down_bytes)}, {format_seconds(event.seconds)}"
            simulated = "" if event.simulated_seconds is None else f" ({format_seconds(event.simulated_seconds)} simulated)"
            return f"{event.phase} round {event.round}: {_counted(len(event.edges), 'update')}, {moved}{simulated}"
        case Evaluated():
            return f"{event.row}: " + ", ".join(
                f"{name} {value:.4g}" for name, value in event.metrics.items() if not name.startswith("num_")
            )
        case RunFinished():
            return f"{event.status} after {format_seconds(event.seconds)}"
        case _:
            return ""


def _data(event: DataLoaded) -> str:
    of = f" of {event.edge}" if event.edge else ""
    notes = [f"{event.num_skipped} skipped"] if event.num_skipped else []
    notes += [f"{event.num_truncated} cut to max_length"] if event.num_truncated else []
    counted = f"{_counted(event.num_rows, 'row')}, {_counted(event.num_tokens, 'token')}, {event.num_label_tokens} with loss"
    noted = f" ({', '.join(notes)})" if notes else ""
    return f"{event.role} data{of}: {counted}{noted}"


def _edge(event: EdgeFinished) -> str:
    done = f"{_counted(event.num_steps, 'step')}, mean loss {event.mean_loss:.4g}"
    moved = f"up {format_bytes(event.up_bytes)}, down {format_bytes(event.down_bytes)}, {format_seconds(event.seconds)}"
    return f"{event.phase} round {event.round}: {event.edge}, {done}, {moved}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
