"""Runs in a list, one alone, and side by side: what `atoll runs` and the commands below it show."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from atoll.report.tables import Listing, number_text
from atoll.runs.comparison import Comparison
from atoll.runs.record import RunRecord, again_with, at, go_on_with, number_in, table
from atoll.units import format_bytes, format_flops, format_seconds

_WHOSE = "memory is measured of the process, and edges that share one count each other's rows, bases and libraries"
_GOES_ON = ("interrupted", "failed", "stopped")
_WORDS = {
    "up_bytes": "sent by edges", "down_bytes": "sent to edges", "wall_seconds": "time", "simulated_seconds": "time by declared speeds",
    "measured_peak_bytes": "memory, most of an edge", "predicted_peak_bytes": "memory, as planned", "edge_flops": "computed by edges",
    "dropped_rounds": "rounds missed",
}  # fmt: skip
_UNITS = {"bytes": format_bytes, "seconds": format_seconds, "flops": format_flops}


def list_of_runs(runs: Sequence[RunRecord], title: str) -> Listing:
    """A line for each run; its loss before and after."""
    rows = [(run.name, run.status, run.method or "-", run.base or "-", _losses(run), when(run.started)) for run in runs]
    header = ("run", "status", "method", "base", "loss", "when")
    return Listing(title, header, rows, [(run.name, run.problem) for run in runs if run.problem], "status")


def facts_of(run: RunRecord, noted: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of one run, each fact with its label."""
    path = str(run.path)
    took = "" if run.wall_seconds is None else f", took {format_seconds(run.wall_seconds)}"
    facts = [
        ("status", run.status), ("problem", run.problem or ""), ("began", when(run.started) + took if run.started else ""),
        ("folder", path), ("command", shlex.join(run.command or ())), ("repeats", run.repeats or ""), ("method", run.method or ""),
        ("on top", "; ".join(run.overrides)), ("base", run.base or ""), ("data from", str(noted.get("folder") or "")),
        ("edges", ", ".join(run.edges)), ("rounds", _text(run.rounds)), ("seed", _text(run.seed)),
        ("adapter", str(run.path / "adapter") if (run.path / "adapter").is_dir() else ""),
        ("go on", shlex.join(go_on_with(run.path, noted) or ()) if run.status in _GOES_ON else ""),
        ("again", shlex.join(again_with(run.path, noted) or ()) if noted else ""),
    ]  # fmt: skip
    return [(label, text) for label, text in facts if text]


def edges_of(summary: Mapping[str, Any], config: Mapping[str, Any]) -> Listing | None:
    """What each edge did, and who held more than it has by the run's config; None where a summary does not say."""
    found = at(summary, "edges")
    edges = list(map(table, found)) if isinstance(found, list) else []
    asked = at(config, "edge")
    limits = {one.get("name"): number_in(one, "memory") for one in map(table, asked if isinstance(asked, list) else ())}
    over = [
        (str(edge.get("name")), f"held {format_bytes(held)} of the {format_bytes(limit)} that it has; {_WHOSE}")
        for edge in edges
        if (limit := limits.get(edge.get("name"))) is not None and (held := number_in(edge, "measured_peak_bytes") or 0) > limit
    ]
    header = ("edge", "mode", "bits", "batch", "steps", "memory", "planned", "up", "down", "rounds missed")
    return Listing("edges", header, list(map(_edge_row, edges)), over) if edges else None


def side_by_side(comparison: Comparison) -> tuple[Listing, Listing]:
    """Where configs differ; and what the runs came to."""
    header = ("", *comparison.runs)
    given = [(key, *map(_text, values)) for key, values in comparison.config.items()]
    figures = [
        (_WORDS.get(key, key.replace("_", " ")), *(_figure(key, value) for value in values)) for key, values in comparison.figures.items()
    ]
    return Listing("settings that differ" if given else "the settings are the same", header, given), Listing("results", header, figures)


def when(started: str | None) -> str:
    """A time of events.jsonl on the clock of this machine, to the minute."""
    if started is None:
        return "-"
    try:
        found = datetime.fromisoformat(started)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return started


def _losses(run: RunRecord) -> str:
    if run.loss_before is None and run.loss_after is None:
        return "-"
    return f"{number_text(run.loss_before, 'loss')} -> {number_text(run.loss_after, 'loss')}"


def _edge_row(edge: Mapping[str, Any]) -> tuple[str, ...]:
    def size(key: str) -> str:
        value = number_in(edge, key)
        return "-" if value is None else format_bytes(value)

    counts = (_text(edge.get(key)) for key in ("name", "mode", "bits", "batch_size", "steps"))
    sizes = (size(key) for key in ("measured_peak_bytes", "predicted_peak_bytes", "up_bytes", "down_bytes"))
    missed, first = _text(edge.get("dropped_rounds")), number_in(edge, "first_round") or 1
    return (*counts, *sizes, missed if first <= 1 else f"{missed}, joined in round {first:g}")


def _figure(key: str, value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    unit = _UNITS.get(key.rpartition("_")[2])
    if unit is not None:
        return unit(value)
    return str(value) if isinstance(value, int) else number_text(value, key.rpartition(" ")[2])


def _text(value: object) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
