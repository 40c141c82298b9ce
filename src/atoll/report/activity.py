"""Which modules an edge trained at which step, and what its choices were made by: from the event log."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from atoll.errors import RunFolderError
from atoll.runs.events import ModulesChosen, StepDone, read_events

_PHASE = "federated"


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive steps with the same active modules: from `first` up to and without `end`."""

    first: int
    end: int
    active: tuple[str, ...]
    is_window: bool
    """Whether the whole pool was active to be observed."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The modules that were kept active after `step` steps, and the score of each; None for a score that was not finite."""

    step: int
    active: tuple[str, ...]
    scores: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class EdgeActivity:
    """One edge's federated phase; all tuples of modules are in the pool's order, segments and choices in that of the steps."""

    edge: str
    policy: str
    modules: tuple[str, ...]
    segments: tuple[Segment, ...]
    choices: tuple[Choice, ...]

    @property
    def active_share(self) -> float:
        """Mean over the steps of active modules / pool; 0 without any step."""
        num_steps = sum(segment.end - segment.first for segment in self.segments)
        trained = sum((segment.end - segment.first) * len(segment.active) for segment in self.segments)
        return trained / (num_steps * len(self.modules)) if num_steps else 0.0

    def spans(self, module: str | None = None, *, windows: bool | None = None) -> tuple[tuple[int, int], ...]:
        """(first, end) of the steps in which the module was trained, joined where they adjoin; None: those of the whole run.

        `windows`: those in windows only, or those by choice only.
        """
        found: list[tuple[int, int]] = []
        for own in self.segments:
            if windows not in (None, own.is_window) or (module is not None and module not in own.active):
                continue
            first = found.pop()[0] if found and found[-1][1] == own.first else own.first
            found.append((first, own.end))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class _Step:
    """What is needed of a step_done line."""

    phase: str
    edge: str
    step: int


@dataclass(frozen=True, slots=True)
class _Decision:
    """What is needed of a modules_chosen line."""

    phase: str
    edge: str
    step: int
    reason: Literal["window", "choice"]
    policy: str
    active: tuple[str, ...]
    killed: tuple[str, ...]
    scores: Mapping[str, float | None]

    def __post_init__(self) -> None:
        if not self.active:
            raise ValueError("no module is active")


def read_activities(events_path: Path, orders: Mapping[str, Sequence[str]]) -> tuple[EdgeActivity, ...]:
    """The edges whose modules were chosen in the federated phase, in the log's order; none for a run that always trains every module.

    `orders`: for each edge its modules in the pool's order; modules that are absent there come after the others, by block and name.

    Raises: RunFolderError for a log that is missing, damaged, or lacks a field.
    """
    steps: dict[str, set[int]] = {}
    decisions: dict[str, list[_Decision]] = {}
    for line in _lines(events_path):
        if line.phase != _PHASE:
            continue
        if isinstance(line, _Step):
            steps.setdefault(line.edge, set()).add(line.step)
        else:
            decisions[line.edge] = [*_not_undone(decisions.get(line.edge, ()), line), line]
    return tuple(_activity(edge, own, steps.get(edge, ()), orders.get(edge, ())) for edge, own in decisions.items())


def short_labels(modules: Sequence[str]) -> tuple[str, ...]:
    """Block number and last name ("3.q_proj"); all that follows the block's number where the last name alone is not unique."""
    labels = [_label(name, whole=False) for name in modules]
    return tuple(label if labels.count(label) == 1 else _label(name, whole=True) for name, label in zip(modules, labels, strict=True))


def block_of(module: str) -> int | None:
    """The block's number: the first whole number among the parts of a module's name; None where there is none."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def _label(module: str, *, whole: bool) -> str:
    match = re.search(r"(?:^|\.)([0-9]+)\.(.+)", module)
    if match is None:
        return module
    return f"{match[1]}.{match[2] if whole else match[2].rpartition('.')[2]}"


def _lines(path: Path) -> Iterator[_Step | _Decision]:
    from pydantic import TypeAdapter, ValidationError

    forms: dict[object, TypeAdapter[_Step] | TypeAdapter[_Decision]] = {
        StepDone.kind(): TypeAdapter(_Step), ModulesChosen.kind(): TypeAdapter(_Decision),
    }  # fmt: skip
    for number, line in enumerate(read_events(path), start=1):
        form = forms.get(line.get("event")) if isinstance(line, dict) else TypeAdapter(_Step)
        if form is None:
            continue
        try:
            yield form.validate_python(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            got = f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
            what, where = "an event lacks what it must have", f"{path}, line {number}"
            do = "the file was changed after the run, or another version wrote it; run `atoll train` again"
            raise RunFolderError(what, where=where, got=got, expected="an event as docs/run-directory.md says", do=do) from None


def _not_undone(before: Sequence[_Decision], line: _Decision) -> Iterator[_Decision]:
    """An edge that is dropped in the middle of a round does its steps anew: what it had decided from there on no longer holds."""
    return (old for old in before if old.step < line.step or (old.step == line.step and old.reason != line.reason))


def _activity(edge: str, decisions: Sequence[_Decision], steps: Iterable[int], order: Sequence[str]) -> EdgeActivity:
    found = {name for own in decisions for name in (*own.active, *own.killed)}
    place = {name: number for number, name in enumerate(order)}
    pool = tuple(sorted(found, key=lambda name: (place.get(name, len(place)), block_of(name) or 0, name)))
    choices = tuple(
        Choice(own.step, _in_order(own.active, pool), {name: own.scores.get(name) for name in pool} if own.scores else {})
        for own in decisions
        if own.reason == "choice"
    )
    return EdgeActivity(edge, decisions[0].policy, pool, _segments(pool, decisions, steps), choices)


def _segments(pool: tuple[str, ...], decisions: Sequence[_Decision], steps: Iterable[int]) -> tuple[Segment, ...]:
    # Before the first decision every module is trained, and that is what the decision rests on.
    states = [(pool, True), *((_in_order(own.active, pool), own.reason == "window") for own in decisions)]
    begins = [own.step for own in decisions]
    found: list[Segment] = []
    for step in sorted(steps):
        active, is_window = states[bisect_right(begins, step)]
        last = found[-1] if found else None
        if last is not None and (last.end, last.active, last.is_window) == (step, active, is_window):
            found[-1] = replace(last, end=step + 1)
        else:
            found.append(Segment(step, step + 1, active, is_window))
    return tuple(found)


def _in_order(names: Iterable[str], pool: Sequence[str]) -> tuple[str, ...]:
    chosen = set(names)
    return tuple(name for name in pool if name in chosen)
