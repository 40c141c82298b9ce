"""What an event says in numbers, and along which axis: the same for every tracker."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from atoll.runs.events import EdgeFinished, Evaluated, Event, RoundFinished, StepDone
from atoll.runs.files import write_json
from atoll.runs.record import at, table, text_in
from atoll.runs.tracker import TrackedRun

IDS = ".trackers.json"
"""Where a run keeps under what id each tracker has it, so that it goes on there."""


@dataclass(frozen=True, slots=True)
class Points:
    """Numbers of one moment. `group` goes before their names; `step` counts the edge's steps, or rounds."""

    group: str
    """"federated/NAME" of steps; "rounds/federated", "rounds/federated/NAME" and "held-out/ROW" of rounds."""
    step: int
    values: Mapping[str, float]

    @property
    def by_round(self) -> bool:
        """Whether `step` is a round."""
        return self.group.startswith(("rounds/", "held-out/"))

    @property
    def named(self) -> dict[str, float]:
        """The values under their whole names."""
        return {f"{self.group}/{name}": value for name, value in self.values.items()}


def points_of(event: Event, rounds: int) -> Points | None:
    """The numbers of an event of a run of so many rounds; None where it has none."""
    match event:
        case StepDone():
            values = {"loss": event.loss, "learning_rate": event.learning_rate, "grad_norm": event.grad_norm}
            return Points(f"{event.phase}/{event.edge}", event.step, {**values, "active_modules": event.num_active})
        case EdgeFinished():
            sizes = {"up_bytes": event.up_bytes, "down_bytes": event.down_bytes, "peak_bytes": event.peak_bytes}
            values = {"mean_loss": event.mean_loss, "seconds": event.seconds, **sizes}
            return Points(f"rounds/{event.phase}/{event.edge}", event.round, values)
        case RoundFinished():
            values = {"up_bytes": event.up_bytes, "down_bytes": event.down_bytes, "seconds": event.seconds}
            values |= {} if event.simulated_seconds is None else {"simulated_seconds": event.simulated_seconds}
            return Points(f"rounds/{event.phase}", event.round, {**values, "edges": len(event.edges)})
        case Evaluated():
            on_the_way = event.row.removeprefix("round-")
            row, step = ("federated", int(on_the_way)) if on_the_way.isdigit() else (event.row, 0 if event.row == "base" else rounds)
            scores = {name: value for name, value in event.metrics.items() if not name.startswith("num_")}
            return Points(f"held-out/{row.replace(':', '/')}", step, scores)
        case _:
            return None


def rounds_of(run: TrackedRun) -> int:
    """How many rounds were asked for."""
    found = at(run.config, "run", "rounds")
    return found if isinstance(found, int) else 0


def project_of(run: TrackedRun) -> str:
    """Under which name runs are filed together."""
    return text_in(run.config, "track", "project") or "atoll"


def kept_id(run: TrackedRun, tracker: str, make: Callable[[], str]) -> str:
    """The id under which a tracker has this run: as it was kept when the run began, or a new one, kept from now on."""
    path = run.run_dir / IDS
    known = _read(path)
    if (found := text_in(known, tracker)) is None:
        found = make()
        write_json(path, {**known, tracker: found})
    return found


def flat(config: Mapping[str, object], above: str = "") -> dict[str, object]:
    """Every key of a config by its dotted name; lists as JSON."""
    found: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple) else value
    return found


def _read(path: Path) -> Mapping[str, object]:
    try:
        return table(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
