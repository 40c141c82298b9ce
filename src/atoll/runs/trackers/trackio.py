"""Trackio: a run of the project that [track] project names, on this machine (TRACKIO_DIR, or Trackio's own default), for `trackio show`."""

from __future__ import annotations

import contextlib
import sys
from uuid import uuid4

from atoll.runs.events import Event
from atoll.runs.tracker import TrackedRun
from atoll.runs.trackers.points import flat, kept_id, points_of, project_of, rounds_of


class Trackio:
    """By trackio. It knows runs by their names alone: each has a few letters of its own behind the name of its folder."""

    needs = ("trackio",)

    def start(self, run: TrackedRun) -> None:
        """Begin the run, or go on with it."""
        import trackio

        self._rounds = rounds_of(run)
        name = kept_id(run, "trackio", lambda: f"{run.name}-{uuid4().hex[:6]}")
        with contextlib.redirect_stdout(sys.stderr):  # It has some words of its own, which are no results.
            self._run = trackio.init(
                project=project_of(run), name=name, config=flat(run.config), resume="allow", embed=False, auto_log_gpu=False,
                auto_log_cpu=False,
            )  # fmt: skip

    def event(self, event: Event) -> None:
        """A line of numbers at the step that they belong to."""
        points = points_of(event, self._rounds)
        if points is not None:
            self._run.log(points.named, step=points.step)

    def finish(self, status: str) -> None:
        """End it."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()
