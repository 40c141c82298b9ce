"""TensorBoard: event files in the run's own folder, for `tensorboard --logdir runs`."""

from __future__ import annotations

import json

from atoll.runs.events import Event
from atoll.runs.tracker import TrackedRun
from atoll.runs.trackers.points import points_of, rounds_of


class TensorBoard:
    """By torch's writer, which needs the tensorboard package and no TensorFlow."""

    needs = ("tensorboard",)

    def start(self, run: TrackedRun) -> None:
        """Open a file, another one for a run that goes on; the config is the text "config"."""
        from torch.utils.tensorboard import SummaryWriter  # Training has loaded torch already.

        self._rounds, self._writer = rounds_of(run), SummaryWriter(str(run.run_dir / "tensorboard"))
        config = json.dumps(run.config, indent=2, ensure_ascii=False)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()))  # As Markdown shows what is typed.

    def event(self, event: Event) -> None:
        """A scalar for each number."""
        points = points_of(event, self._rounds)
        if points is None:
            return
        for name, value in points.named.items():
            self._writer.add_scalar(name, value, points.step)
        if points.by_round:
            self._writer.flush()

    def finish(self, status: str) -> None:
        """Close the file."""
        self._writer.add_text("status", status)
        self._writer.close()
