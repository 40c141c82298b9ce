"""The seam of tracking: who else is told what happens in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from atoll.errors import UnavailableError
from atoll.registry.parts import make, trait
from atoll.registry.parts import names as names_of
from atoll.runs.events import Event, RunFinished


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told first."""

    name: str
    run_dir: Path
    config: Mapping[str, object]
    """Every key with the value that holds, as JSON values."""


class Tracker(Protocol):
    """A tracker, made for one run. It hears what events.jsonl keeps, as it comes; nothing of it may wait for long."""

    def start(self, run: TrackedRun) -> None:
        """The run begins, or goes on."""

    def event(self, event: Event) -> None:
        """Something happened."""

    def finish(self, status: str) -> None:
        """The run is over: complete, interrupted or failed. Of a run that is killed it is not told."""


def check_trackers(names: Sequence[str]) -> None:
    """Whether the libraries of these trackers are installed.

    Raises: UnavailableError naming the first that is not.
    """
    for name in names:
        absent = [module for module in trait("tracker", name, "needs") if find_spec(module) is None]
        if absent:
            extra = f"pip install 'atoll[{name}]'" if name in names_of("tracker") else "install it"
            raise UnavailableError(
                f"the tracker {name} needs a library that is not installed", where="[track] to", got=f"no module {', '.join(absent)}",
                expected="its library", do=f"{extra}, or take {name} out of [track] to",
            )  # fmt: skip


class Tracking:
    """An observer of a run's events that passes them on. A tracker that raises is told no more, and `tell` is told why: the run goes on."""

    def __init__(
        self, names: Sequence[str], options: Mapping[str, Mapping[str, object]], run: TrackedRun, tell: Callable[[str], None]
    ) -> None:
        self._tell = tell
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            tracker: Tracker = make("tracker", name, options.get(name))
            self._trackers[name] = tracker
            self._try(name, lambda one=tracker: one.start(run))  # type: ignore[misc]

    def __call__(self, event: Event) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda one=tracker: one.event(event))  # type: ignore[misc]
            if isinstance(event, RunFinished) and name in self._trackers:
                self._try(name, lambda one=tracker: one.finish(event.status))  # type: ignore[misc]

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as problem:
            if isinstance(problem, MemoryError):
                raise
            self._trackers.pop(name, None)
            self._tell(f"the tracker {name} failed and is told no more: {type(problem).__name__}: {problem}")
