"""Weights & Biases: a run of the project that [track] project names; WANDB_MODE=offline keeps it in the run's folder, for `wandb sync`."""

from __future__ import annotations

from uuid import uuid4

from atoll.runs.events import Event
from atoll.runs.tracker import TrackedRun
from atoll.runs.trackers.points import kept_id, points_of, project_of, rounds_of


class Wandb:
    """By wandb. Edges count steps of their own, so that each has its own axis; all that is told of a round is along the axis "round"."""

    needs = ("wandb",)

    def start(self, run: TrackedRun) -> None:
        """Begin the run, or go on with it. What a process prints stays here."""
        import wandb

        self._rounds, self._axes = rounds_of(run), set[str]()
        self._run = wandb.init(
            project=project_of(run), name=run.name, id=kept_id(run, "wandb", lambda: uuid4().hex[:12]), resume="allow",
            dir=str(run.run_dir), config=dict(run.config), settings=wandb.Settings(console="off"),
        )  # fmt: skip
        for group in ("rounds", "held-out"):
            self._run.define_metric(f"{group}/*", step_metric="round")

    def event(self, event: Event) -> None:
        """A line of numbers, with the step that they belong to."""
        points = points_of(event, self._rounds)
        if points is None:
            return
        axis = "round" if points.by_round else f"{points.group}/step"
        if not points.by_round and axis not in self._axes:
            self._axes.add(axis)
            self._run.define_metric(f"{points.group}/*", step_metric=axis)
        self._run.log({**points.named, axis: points.step})

    def finish(self, status: str) -> None:
        """End it; all but a complete run counts as failed there."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "complete" else 1)
