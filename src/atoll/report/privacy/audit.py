"""What an audit found, as a table; from its JSON document alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atoll.report.tables import Listing
from atoll.units import counted, format_seconds

HEADER = ("attack", "tokens", "95 %", "top 5", "rare", "common", "ROUGE-L", "chance", "rows", "took")
_LONGEST = 300


def audit_table(document: Mapping[str, Any]) -> Listing:
    """A row for each attack that applies; below, why others do not, and one row beside what was recovered of it."""
    attacks: Sequence[Mapping[str, Any]] = document["attacks"]
    rows, notes = [], list[tuple[str, str]]()
    for one in attacks:
        if one["rows"]:
            rows.append(_row(one))
        if one["why"]:
            notes.append((one["name"], one["why"]))
        notes += [(one["name"], f"{name.replace('_', ' ')} {value:.4g}") for name, value in _own(one)]
        if one["example"] is not None:
            notes += [(one["name"], f"{what}: {one['example'][what][:_LONGEST]}") for what in ("true", "recovered")]
    return Listing(_title(document["setting"]), HEADER, rows, notes)


def describe(one: Mapping[str, Any]) -> str:
    """One line for an attack that has ended."""
    if not one["rows"]:
        return f"{one['name']}: does not apply: {one['why']}"
    first = _share(one["tokens_recovered"]) + " of tokens" if one["tokens_recovered"] is not None else _own_line(one)
    return f"{one['name']}: {first}, {format_seconds(one['seconds'])}"


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    low_high, area = one["interval"], one.get("auc") if one["tokens_recovered"] is None else None
    shown, scale, places = (_share(one["tokens_recovered"]), 100, 1) if area is None else (f"AUC {area:.3f}", 1, 3)
    return (
        one["name"], shown, "-" if low_high is None else " to ".join(f"{scale * end:.{places}f}" for end in low_high),
        *(_share(one[name]) for name in ("top5_recovered", "rare_recovered", "common_recovered", "rouge_l")),
        _share(one["chance"]) if area is None else f"AUC {one['chance']:.3f}",
        str(one["rows"]), format_seconds(one["seconds"]),
    )  # fmt: skip


def _title(setting: Mapping[str, Any]) -> str:
    edges = ", ".join(f"{count} {mode}" for mode, count in setting["edges"].items())
    cut, text = setting["cut"], f"{setting['public']} ({counted(setting['public_tokens'], 'token')})"
    where = "no cut" if cut is None else f"cut {cut['front']}/{cut['back']}, {setting['wire']} in {setting['codec']}"
    return f"{setting['base']}: {edges}; {where}; adapter {setting['adapter']}; learned from {text}"


def _own(one: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The figures of this attack alone."""
    return [(name, value) for name, value in one.items() if name == "auc" or name.endswith(("_error", "_wrong")) or "_at_batch_" in name]


def _own_line(one: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in _own(one))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
