"""What happens in a run, as typed events; one JSON line each in events.jsonl, and the same values to whoever watches."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from atoll.errors import ResumeError, RunFolderError
from atoll.parsed import parse_json
from atoll.runs.files import finite

_LOOKS, _LOOK_SECONDS = 5, 0.02
Phase = Literal["federated", "local-only", "central", "homogeneous", "warm-up", "personal", "evaluate"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; the fields of a subclass are the fields of its line."""

    @classmethod
    def kind(cls) -> str:
        """The name on the line: StepDone -> "step_done"."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """The run directory exists and its config is checked."""

    name: str
    seed: int
    rounds: int
    edges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """The run goes on after round `round`, in a new process; what comes before of later rounds is done again."""

    round: int


@dataclass(frozen=True, slots=True)
class DataLoaded(Event):
    """Rows became tokens; counted before any step."""

    role: Literal["train", "eval"]
    edge: str
    num_rows: int
    num_skipped: int
    num_truncated: int
    num_tokens: int
    num_label_tokens: int


@dataclass(frozen=True, slots=True)
class Advised(Event):
    """A setting that can be kept, and is hardly what was meant."""

    edge: str
    advice: str


@dataclass(frozen=True, slots=True)
class ImportanceFound(Event):
    """How much each module matters, by a warm-up on the edges' own data; a later one holds in place of an earlier."""

    importance: str
    """How it was found."""
    edges: tuple[str, ...]
    """Whose scores count."""
    scores: Mapping[str, float]
    """By full module name."""
    seconds: float
    simulated_seconds: float | None = None
    """By the edges' declared speeds and links; None where one declares neither."""


@dataclass(frozen=True, slots=True)
class EdgeLeftOut(Event):
    """Nothing fits this edge, and the run goes on without it."""

    edge: str
    reason: str


@dataclass(frozen=True, slots=True)
class PhaseStarted(Event):
    """A part of the run with its number of steps over all edges and rounds; "evaluate": of rows."""

    phase: Phase
    total_steps: int


@dataclass(frozen=True, slots=True)
class RoundStarted(Event):
    """Rounds count from 1."""

    phase: Phase
    round: int
    rounds: int
    edges: tuple[str, ...] = ()
    """Those that are asked."""


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """One optimizer step of one edge."""

    phase: Phase
    round: int
    edge: str
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_label_tokens: int
    num_active: int
    """Modules that were trained in this step."""


@dataclass(frozen=True, slots=True)
class ModulesChosen(Event):
    """The modules that an edge trains from now on; `step` counts the edge's steps before."""

    phase: Phase
    round: int
    edge: str
    step: int
    reason: Literal["window", "choice"]
    """A window opens, with every module active; or a choice was made."""
    policy: str
    active: tuple[str, ...]
    killed: tuple[str, ...]
    """All that are not active."""
    revived: tuple[str, ...]
    """Active from now on, and not before."""
    scores: Mapping[str, float]
    """By module, what the choice was made by; empty where nothing was observed."""


@dataclass(frozen=True, slots=True)
class EdgeFinished(Event):
    """An edge's part of a round is done and its update sent."""

    phase: Phase
    round: int
    edge: str
    num_steps: int
    mean_loss: float
    up_bytes: int
    down_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class HostLost(Event):
    """An edge lost its host within a step, and tries to reach it again; the step will be done anew."""

    edge: str
    reason: str


@dataclass(frozen=True, slots=True)
class EdgeDropped(Event):
    """An edge gave no update in this round."""

    round: int
    edge: str
    reason: str


@dataclass(frozen=True, slots=True)
class UpdateClipped(Event):
    """An edge's update moved further than [federated] clip_update lets it, and was shrunk."""

    round: int
    edge: str
    norm: float
    """Frobenius norm of its change, as it came."""
    limit: float


@dataclass(frozen=True, slots=True)
class RoundFinished(Event):
    """The updates of a round became one; `discarded_share` is what the common adapter misses of their exact mean."""

    phase: Phase
    round: int
    edges: tuple[str, ...]
    discarded_share: float
    up_bytes: int
    down_bytes: int
    seconds: float
    simulated_seconds: float | None = None
    """By the edges' declared speeds and links; None where one declares neither."""


@dataclass(frozen=True, slots=True)
class CheckpointWritten(Event):
    """A whole checkpoint lies at `path`."""

    round: int
    path: str


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """One row of the comparison: "base", "federated", "central", "homogeneous", "local-only:NAME"; or "round-N" on the way.

    "personal:NAME", "base:NAME", "federated:NAME" and so on are of one edge's own held-out rows.
    """

    row: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """The last line of every run that was not killed."""

    status: Literal["complete", "interrupted", "failed"]
    seconds: float


Observer = Callable[[Event], None]


class EventLog:
    """Appends events to a file, whole line by whole line, and shows each to the observers. `path` None: observers only.

    While it is open no other process can open the same file as an event log; the death of a process opens it to others.

    Raises: ResumeError where another process has it.
    """

    def __init__(self, path: Path | None, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._file: IO[bytes] | None = None
        if path is not None:
            self._file = _locked(path)
            _drop_torn_line(path)

    def show_to(self, observer: Observer) -> None:
        """Show later events to one more, after the others."""
        self._observers = (*self._observers, observer)

    def append(self, event: Event) -> None:
        """Write one line, then tell the observers in their order.

        Raises: OSError where the disk takes no whole line; no half of one stays.
        """
        if self._file is not None:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "event": event.kind()} | {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
            _write_whole(self._file, json.dumps(finite(line), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        for observer in self._observers:
            observer(event)

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_events(path: Path) -> Iterator[dict[str, object]]:
    """The lines of an event log as JSON objects; a torn last line, from a process that was killed, is left out.

    Raises: RunFolderError for a log that is missing or damaged elsewhere.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        got = error.strerror or str(error)
        do = "give the folder of a run that started"
        raise RunFolderError("the run has no readable event log", where=str(path), got=got, expected="events.jsonl", do=do) from None
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield parse_json(line)
        except ValueError:
            what, where = "an event cannot be read", f"{path}, line {number}"
            do = "the file was changed after it was written; take the line out"
            raise RunFolderError(what, where=where, got=repr(line[:60]), expected="a JSON object", do=do) from None


def is_worked_on(path: Path) -> bool:
    """Whether a process has this event log open, to write to it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keep every other process from opening an event log that is there, for as long as this context lasts.

    Raises: ResumeError where another process has it; OSError where it cannot be opened.
    """
    with _locked(path):
        yield


def _locked(path: Path) -> IO[bytes]:
    file = path.open("ab", buffering=0)
    try:
        for last in (False,) * _LOOKS + (True,):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if last:
                    raise
                time.sleep(_LOOK_SECONDS)  # Whoever lists runs has it for a moment.
    except BlockingIOError:
        file.close()
        raise ResumeError(
            "another process works on this run", where=str(path.parent), got="a run that goes on", expected="a run that was stopped",
            do="wait until it ends, or stop it",
        ) from None  # fmt: skip
    return file


def _write_whole(file: IO[bytes], line: bytes) -> None:
    # Unbuffered and in one call: a process that is killed leaves whole lines and at most one torn one.
    before = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    except OSError:
        os.ftruncate(file.fileno(), before)
        raise


def _drop_torn_line(path: Path) -> None:
    """A run that goes on must not glue its first line to half a line of the run before."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
