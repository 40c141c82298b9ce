"""MLflow: a run of the experiment that [track] project names, where MLFLOW_TRACKING_URI says, or MLflow's own default."""

from __future__ import annotations

import time
from typing import Any

from atoll.runs.events import Event
from atoll.runs.tracker import TrackedRun
from atoll.runs.trackers.points import flat, kept_id, points_of, project_of, rounds_of

_BATCH, _PARAMS, _LONGEST = 1000, 100, 6000
"""What MLflow takes in one call, and of one value."""
_STATUSES = {"complete": "FINISHED", "interrupted": "KILLED"}


class MLflow:
    """By MLflow's client. Numbers of steps are sent with the next ones of a round: a server is not asked at every step."""

    needs = ("mlflow",)

    def start(self, run: TrackedRun) -> None:
        """Make the run, or find it again where it goes on; every key of the config is a parameter."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client, self._rounds, self._waiting = MlflowClient(), rounds_of(run), list[Any]()
        self._run_id = kept_id(run, "mlflow", lambda: self._new(run))
        self._client.set_terminated(self._run_id, "RUNNING")
        self._client.update_run(self._run_id, status="RUNNING")
        known = self._client.get_run(self._run_id).data.params
        params = [Param(key, str(value)[:_LONGEST]) for key, value in flat(run.config).items() if value is not None and key not in known]
        for first in range(0, len(params), _PARAMS):
            self._client.log_batch(self._run_id, params=params[first : first + _PARAMS])

    def event(self, event: Event) -> None:
        """A metric for each number."""
        from mlflow.entities import Metric

        points, now = points_of(event, self._rounds), int(time.time() * 1000)
        if points is None:
            return
        self._waiting += [Metric(name, float(value), now, points.step) for name, value in points.named.items()]
        if points.by_round or len(self._waiting) >= _BATCH:
            self._send()

    def finish(self, status: str) -> None:
        """Say how it ended."""
        self._send()
        self._client.set_terminated(self._run_id, _STATUSES.get(status, "FAILED"))

    def _new(self, run: TrackedRun) -> str:
        project = project_of(run)
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        return self._client.create_run(experiment_id, run_name=run.name).info.run_id

    def _send(self) -> None:
        while self._waiting:
            now, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            self._client.log_batch(self._run_id, metrics=now)
