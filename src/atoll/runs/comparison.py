"""Runs side by side: where their configs differ, and what each came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atoll.runs.layout import RunDirectory
from atoll.runs.record import at, number_in, read_noted, read_record, table

_SCORES = (("base", "base"), ("adapted", "adapted"), ("local_only", "local-only"), ("homogeneous", "homogeneous"), ("central", "central"))
_HASHES = {"base_hash": "weights of the base", "start_digest": "adapter at the start", "held_out": "held-out rows"}
_HASH_LENGTH = 12


@dataclass(frozen=True, slots=True)
class Comparison:
    """A value for each run under each key, in the order of the runs; None where a run has none."""

    runs: tuple[str, ...]
    """Their names; their paths where two have the same name."""
    config: Mapping[str, tuple[object, ...]]
    """What is not the same in all of them: keys of run.toml, method, versions, hashes of base and rows."""
    figures: Mapping[str, tuple[float | str | None, ...]]
    """Status, scores ("adapted loss"), bytes, seconds, memory, steps."""

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {"runs": self.runs, "config": self.config, "figures": self.figures}


def compared(runs: Sequence[RunDirectory]) -> Comparison:
    """These runs side by side, whatever of their files can be read."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    read = [read_noted(run) for run in runs]
    given = [dict(_given(noted)) for noted, _ in read]
    figures = [{"status": read_record(run.path).status, **figures_of(summary)} for run, (_, summary) in zip(runs, read, strict=True)]
    config = {key: values for key, values in _side_by_side(given).items() if any(value != values[0] for value in values)}
    return Comparison(tuple(names), config, _side_by_side(figures))


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys of run.toml whose values differ between two resolved configs."""
    both = _side_by_side([dict(_flat("", config)) for config in (one, other)])
    return [key for key, (here, there) in both.items() if here != there]


def figures_of(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """What a summary says that a run came to and cost, each under a key of its own, as far as it says so."""
    found: dict[str, float | None] = {}
    for key, row in _SCORES:
        scores = table(at(summary, "eval", key))
        numbers = {name: number_in(scores, name) for name in scores if not name.startswith("num_")}
        found |= {f"{row} {name}": value for name, value in numbers.items() if value is not None}
    edges = [table(edge) for edge in at(summary, "edges") or ()] if isinstance(at(summary, "edges"), list) else []

    def over_edges(key: str) -> list[float]:
        return [value for edge in edges if (value := number_in(edge, key)) is not None]

    peaks = {key: over_edges(key) for key in ("measured_peak_bytes", "predicted_peak_bytes")}
    return found | {
        "up_bytes": number_in(summary, "traffic", "up_bytes"), "down_bytes": number_in(summary, "traffic", "down_bytes"),
        "wall_seconds": number_in(summary, "seconds", "wall"), "simulated_seconds": number_in(summary, "seconds", "simulated"),
        **{key: max(values, default=None) for key, values in peaks.items()}, "edge_flops": number_in(summary, "edge_compute", "flops"),
        "steps": sum(over_edges("steps")) if edges else None, "dropped_rounds": sum(over_edges("dropped_rounds")) if edges else None,
    }  # fmt: skip


def _given(noted: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """All that a run was given, flat."""
    yield "method", noted.get("method")
    yield from _flat("", table(noted.get("config")))
    for key, words in _HASHES.items():
        yield words, _short(at(noted, "hashes", key))
    for name, value in table(at(noted, "hashes", "rows")).items():
        yield f"rows of {name}", _short(value)
    for name, value in table(noted.get("versions")).items():
        yield f"version of {name}", value


def _flat(above: str, values: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if key == "edge" and not above and isinstance(value, list):
            for edge in map(table, value):
                yield from _flat(f"edge.{edge.get('name')}.", {name: one for name, one in edge.items() if name != "name"})
        elif isinstance(value, Mapping):
            yield from _flat(f"{above}{key}.", value)
        elif above != "run." or key != "name":  # That runs have names of their own says nothing.
            yield f"{above}{key}", value


def _short(value: object) -> str | None:
    return value[:_HASH_LENGTH] if isinstance(value, str) else None


def _side_by_side(values: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    keys = dict.fromkeys(key for one in values for key in one)
    return {key: tuple(one.get(key) for one in values) for key in keys}
