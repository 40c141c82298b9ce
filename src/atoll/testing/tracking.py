"""Checks of trackers: they take whatever happens in a run, in the order in which it does, also twice in one process."""

from __future__ import annotations

import tempfile
from pathlib import Path

from atoll.runs.events import (
    Advised,
    CheckpointWritten,
    EdgeDropped,
    EdgeFinished,
    Evaluated,
    Event,
    HostLost,
    PhaseStarted,
    Resumed,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    StepDone,
)
from atoll.runs.tracker import TrackedRun, Tracking
from atoll.testing.law import Subject

_EVENTS: tuple[Event, ...] = (
    RunStarted("run-0001", 0, 2, ("north", "south")),
    PhaseStarted("federated", 4),
    RoundStarted("federated", 1, 2),
    StepDone("federated", 1, "north", 0, 2.5, 1e-3, 0.5, 64, 32, 8),
    StepDone("federated", 1, "north", 1, float("nan"), 1e-3, float("inf"), 64, 32, 8),
    HostLost("south", "no answer"),
    EdgeFinished("federated", 1, "north", 2, 2.0, 100, 200, 10**9, 1.5),
    EdgeDropped(1, "south", "no answer before the round ended"),
    RoundFinished("federated", 1, ("north",), 0.0, 100, 200, 2.0, None),
    CheckpointWritten(1, "checkpoints/round-0001"),
    Evaluated("local-only:north", {"loss": 1.5, "perplexity": 4.5}),
    Advised("", "something"),
)


def check_tracker(subject: Subject) -> None:
    """Raises: BrokenLaw."""
    for status in ("complete", "interrupted", "failed"):
        with tempfile.TemporaryDirectory() as folder:
            problems: list[str] = []
            run = TrackedRun("run-0001", Path(folder), {"run": {"name": "run", "seed": 0}})
            tracking = Tracking([subject.name], {subject.name: subject.options or {}}, run, problems.append)
            for event in (*_EVENTS, Resumed(1), RunFinished(status, 3.0)):
                tracking(event)
            subject.expect(not problems, "; ".join(problems))
