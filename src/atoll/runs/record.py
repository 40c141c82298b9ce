"""What can be told of a run from its folder alone, whoever wrote it, whole or not: nothing here raises for what is in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from atoll.errors import RunFolderError
from atoll.parsed import parse_json
from atoll.runs.events import is_worked_on
from atoll.runs.layout import RunDirectory, is_half_written, read_object

Status = Literal["running", "complete", "interrupted", "failed", "stopped", "half-written", "unreadable"]
"""As summary.json has it; "running": a process works on it; "stopped": its process ended without a word; or ("half-written") before."""
_ENDED: tuple[Status, ...] = ("complete", "interrupted", "failed")
_LONGEST_LINE = 65_536
_PATHS = ("--fleet", "--ca", "--cert", "--key")
_VALUED = ("--engine", "--host", *_PATHS)
"""Options that `train` and `resume` have both, and a run goes on with as it began."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, as a line of a list. What its folder does not say is None."""

    name: str
    path: Path
    status: Status
    problem: str | None = None
    """Why it cannot be read, or not all of it."""
    method: str | None = None
    """The published method that was asked for by name."""
    base: str | None = None
    rounds: int | None = None
    seed: int | None = None
    edges: tuple[str, ...] = ()
    started: str | None = None
    """ISO 8601, UTC."""
    wall_seconds: float | None = None
    loss_before: float | None = None
    """Of the base, on held-out rows, in nats per completion token (of a classifier, per row)."""
    loss_after: float | None = None
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None
    """As it was typed; None where a program called, or an older version did not keep it."""
    repeats: str | None = None
    """The run that this one was to be again."""

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {**asdict(self), "path": str(self.path)}


def read_record(path: Path) -> RunRecord:
    """What the folder of a run says of it."""
    run = RunDirectory(path)
    name = path.resolve().name
    if is_half_written(path):
        return RunRecord(name, path, "half-written", "it was stopped before it began")
    try:
        noted = run.read_config()
    except RunFolderError as problem:
        return RunRecord(name, path, "unreadable", f"{problem.what}: {problem.got}")
    summary, problem_there = _summary(run)
    config = table(noted.get("config"))
    edges = at(config, "edge")
    return RunRecord(
        name, path, _status(run, summary), problem_there, text_in(noted, "method"), text_in(config, "model", "base"),
        _whole(config, "run", "rounds"), _whole(config, "run", "seed"),
        tuple(str(table(edge).get("name")) for edge in edges) if isinstance(edges, list) else (), _started(run),
        number_in(summary, "seconds", "wall"), number_in(summary, "eval", "base", "loss"), number_in(summary, "eval", "adapted", "loss"),
        texts_in(noted, "overrides"), texts_in(noted, "command") or None, text_in(noted, "repeats"),
    )  # fmt: skip


def read_noted(run: RunDirectory) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and summary.json of a run, as far as they can be read; the rest is empty."""
    try:
        noted = run.read_config()
    except RunFolderError:
        noted = {}
    return noted, _summary(run)[0]


def go_on_with(path: Path, noted: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The command that goes on with a run, with the options that it began with; None for edges that ended with the run."""
    options = _options(noted)
    is_on_fleet = bool(noted.get("run_id"))
    return None if is_on_fleet and "--fleet" not in options else ("atoll", "resume", str(path), *options)


def again_with(path: Path, noted: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The command that trains a run again; None where its folder does not say enough."""
    options = _options(noted)
    if not noted.get("run_id") or "--fleet" in options:
        return ("atoll", "train", str(path), *options)
    # Edges that start with a run read the file, and not the run's folder.
    folder, begin = text_in(noted, "folder"), Path(text_in(noted, "started_in") or "")
    files = [begin / word for word in texts_in(noted, "command")[2:]]
    file = next((one for one in files if one.suffix == ".toml" and str(one.resolve().parent) == folder), None)
    sets = [word for text in texts_in(noted, "overrides") if not text.startswith("method=") for word in ("--set", text)]
    method = ["--method", found] if (found := text_in(noted, "method")) else []
    return None if file is None else ("atoll", "train", str(file), *options, *method, *sets)


def _options(noted: Mapping[str, Any]) -> tuple[str, ...]:
    """How the run reached its edges and hosts, as it was typed; paths from wherever it is typed now."""
    begin, found = text_in(noted, "started_in"), list[str]()
    words = iter([part for word in texts_in(noted, "command")[2:] for part in (word.split("=", 1) if word.startswith("--") else [word])])
    for word in words:
        if word == "--insecure":
            found.append(word)
        elif word in _VALUED and (value := next(words, None)) is not None:
            is_path = word in _PATHS and begin is not None and Path.cwd() != Path(begin)
            found += [word, str(Path(begin or "") / value) if is_path else value]
    return tuple(found)


def at(value: object, *keys: str) -> Any:
    """What lies below these keys of JSON that anybody may have written; None where nothing does."""
    for key in keys:
        value = table(value).get(key)
    return value


def table(value: object) -> Mapping[str, Any]:
    """A value as an object; an empty one where it is none."""
    return value if isinstance(value, Mapping) else {}


def text_in(value: object, *keys: str) -> str | None:
    """The text below these keys."""
    found = at(value, *keys)
    return found if isinstance(found, str) else None


def texts_in(value: object, *keys: str) -> tuple[str, ...]:
    """The list of texts below these keys; empty where there is none."""
    found = at(value, *keys)
    return tuple(found) if isinstance(found, list) and all(isinstance(one, str) for one in found) else ()


def number_in(value: object, *keys: str) -> float | None:
    """The number below these keys."""
    found = at(value, *keys)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def _whole(value: object, *keys: str) -> int | None:
    found = number_in(value, *keys)
    return found if isinstance(found, int) else None


def _summary(run: RunDirectory) -> tuple[dict[str, Any], str | None]:
    if not run.summary_path.exists():
        return {}, None
    try:
        return read_object(run.summary_path), None
    except RunFolderError as problem:
        return {}, f"{problem.what}: {problem.got}"


def _status(run: RunDirectory, summary: Mapping[str, Any]) -> Status:
    ended = summary.get("status")
    if ended == "complete":  # Nobody goes on with such a one.
        return "complete"
    if is_worked_on(run.events_path):
        return "running"
    return next((status for status in _ENDED if status == ended), "stopped")


def _started(run: RunDirectory) -> str | None:
    try:
        with run.events_path.open("rb") as file:
            return text_in(parse_json(file.readline(_LONGEST_LINE)), "time")
    except (OSError, ValueError, json.JSONDecodeError):
        return None
