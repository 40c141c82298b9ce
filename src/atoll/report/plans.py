"""A fleet's plan as a table: what `atoll plan` shows, from the JSON of plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.report.tables import Listing, plain_table
from atoll.units import counted, format_bytes, format_seconds

_HEADER = (
    "edge", "mode", "bits", "rank", "modules", "worth", "batch", "steps/round", "memory", "time/round", "up/round", "down/round", "limit",
)  # fmt: skip
_WORTH, _LIMIT = _HEADER.index("worth"), "limit"


_IMPORTANCE = {"none": "all weights count alike", "unknown": "all weights count alike, until a warm-up (not counted here) says more"}


def plan_table(plan: Mapping[str, Any]) -> Listing:
    """One line for each edge, and below them why."""
    edges: list[Mapping[str, Any]] = list(plan["edges"])
    num_rounds, trainable, whole = plan["rounds"], plan["num_trainable"], plan["num_parameters"]
    title = f"{counted(num_rounds, 'round')}; {trainable:,} of {counted(whole, 'parameter', ',')} trained ({100 * trainable / whole:.2g} %)"
    if plan["importance"] is not None:
        title += "; " + _IMPORTANCE.get(plan["importance"], f"worth of ranks by {plan['importance']}")
    left_out: list[Mapping[str, Any]] = list(plan["left_out"])
    rows = [_row(edge) for edge in edges] + [(edge["name"], "left out", *["-"] * (len(_HEADER) - 2)) for edge in left_out]
    if (steps := plan.get("personal_steps")) is not None:
        seconds = plan.get("personal_seconds")
        title += f"; then {counted(steps, 'step')} of each edge's own" + ("" if seconds is None else f", {format_seconds(seconds)}")
    notes = {edge["name"]: edge["why"] for edge in [*edges, *left_out]}
    for label, key in (("base", "remarks"), ("data", "notes")):
        notes |= {label + " " * number: remark for number, remark in enumerate(plan.get(key, ()))}
    if all(edge["objective"] is None for edge in edges):
        return plain_table(title, _without_worth(_HEADER), [_without_worth(row) for row in rows], notes, _LIMIT)
    return plain_table(title, _HEADER, rows, notes, _LIMIT)


def _without_worth(row: tuple[str, ...]) -> tuple[str, ...]:
    return row[:_WORTH] + row[_WORTH + 1 :]


def _row(edge: Mapping[str, Any]) -> tuple[str, ...]:
    batch = str(edge["batch_size"]) + (f" x {edge['accumulate']}" if edge["accumulate"] > 1 else "")
    seconds = edge["predicted_seconds"]
    return (
        edge["name"],
        edge["mode"],
        str(edge["bits"]),
        _span(edge["ranks"]),
        str(len(edge["ranks"])),
        "-" if edge["objective"] is None else f"{edge['objective']:.1%}",
        batch,
        str(edge["num_steps"]),
        format_bytes(edge["predicted_peak_bytes"]),
        "-" if seconds is None else format_seconds(seconds),
        format_bytes(edge["up_bytes"]),
        format_bytes(edge["down_bytes"]),
        edge["binding"],
    )


def _span(ranks: Mapping[str, int]) -> str:
    smallest, largest = min(ranks.values()), max(ranks.values())
    return str(smallest) if smallest == largest else f"{smallest} to {largest}"
