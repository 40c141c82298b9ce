"""What a run goes on from when its process was killed: written with every checkpoint, and found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.config.document import few
from atoll.config.load import LoadedConfig, config_hash
from atoll.errors import ResumeError
from atoll.jobs.job import Job
from atoll.jobs.rounds import Rounds
from atoll.planner.importance import Importance
from atoll.runs.checkpoints import STATE, checkpoints_of, damage
from atoll.runs.files import finite, write_json
from atoll.runs.layout import RunDirectory
from atoll.runs.summary import Scores
from atoll.tasks.rows import Rows
from atoll.tasks.tokens import Examples

_RUN, _ROUNDS = "run.json", "rounds"
_WHAT = {
    "config_hash": "config.json", "toml_hash": "config.toml", "base_hash": "the base's weights",
    "start_digest": "the adapter to start from", "rows": "an edge's rows", "held_out": "the held-out rows",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a run after a round, beside what its rounds save themselves."""

    totals: Mapping[str, Any]
    base_scores: Scores | None
    """Of the base alone, as they were found at the start."""
    wall_seconds: float
    importance: Importance | None
    """By which the plan in force was made; None: without."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A whole checkpoint to go on from."""

    round: int
    rounds: Path
    """What `Rounds.save` wrote."""
    run_state: RunState
    plan_hash: str
    """Of the plan in force, as plan.json has it."""

    def check_plan(self, job: Job) -> None:
        """Whether the plan of this job is the one that was in force.

        Raises: ResumeError.
        """
        if _plan_hash(job) != self.plan_hash:
            raise ResumeError(
                "the plan is another than when the run was stopped", where=str(self.rounds.parent), got="other settings of an edge",
                expected="the plan that the checkpoint was written by", do="resume with the version of Atoll that the run began with",
            )  # fmt: skip


def write_resume_state(folder: Path, rounds: Rounds, num_done: int, run_state: RunState, hashes: Mapping[str, object]) -> None:
    """Write all that a run goes on from into the folder of a checkpoint."""
    state = folder / STATE
    state.mkdir(mode=0o700)  # Edges' own states are private to them.
    rounds.save(state / _ROUNDS, num_done)
    write_json(state / _RUN, {
        "round": num_done, "hashes": hashes, "plan_hash": _plan_hash(rounds.job), "accounts": run_state.totals,
        "base_scores": run_state.base_scores, "wall_seconds": run_state.wall_seconds,
        "importance": None if run_state.importance is None else run_state.importance.to_json(),
    })  # fmt: skip


def find_resume_point(run: RunDirectory, hashes: Mapping[str, object]) -> tuple[ResumePoint | None, tuple[str, ...]]:
    """The latest whole checkpoint of a run that began with these hashes, and what is wrong with later ones; None: begin anew.

    Raises: ResumeError for a checkpoint of a run that began with others.
    """
    passed: list[str] = []
    for path in checkpoints_of(run).values():
        wrong = damage(path)
        if wrong is None and not (path / STATE).is_dir():
            wrong = "an older one, of which the adapter alone was kept"
        if wrong is not None:
            passed.append(f"checkpoint {path.name} is passed over: {wrong}")
            continue
        resume_point = json.loads((path / STATE / _RUN).read_text(encoding="utf-8"))
        if resume_point["hashes"] != hashes:
            raise ResumeError(
                "a checkpoint is of another run", where=str(path), got="hashes of another config, base or data",
                expected="those of config.json", do="put back what was there, or begin a new run with `atoll train`",
            )  # fmt: skip
        importance = None if resume_point["importance"] is None else Importance.from_json(resume_point["importance"])
        run_state = RunState(resume_point["accounts"], resume_point["base_scores"], resume_point["wall_seconds"], importance)
        return ResumePoint(resume_point["round"], path / STATE / _ROUNDS, run_state, resume_point["plan_hash"]), tuple(passed)
    return None, tuple(passed)


def _plan_hash(job: Job) -> str:
    # Who is left out shows in who is not; the words for it may differ.
    return _json_hash({key: value for key, value in job.plan.to_json().items() if key != "left_out"})


def config_hashes(loaded: LoadedConfig) -> dict[str, object]:
    """SHA-256 of the config as it held, and of the file that it came from."""
    return {"config_hash": config_hash(loaded.config), "toml_hash": hashlib.sha256(loaded.toml_text.encode()).hexdigest()}


def hashes_of(job: Job) -> dict[str, object]:
    """SHA-256 of all that decides what a run comes to, but for versions and the machine."""
    return {
        **hashes_of_members(job), "base_hash": job.base.digest(), "start_digest": job.start.digest(),
        "held_out": None if job.held_out is None else rows_hash(job.held_out),
    }  # fmt: skip


def hashes_of_members(job: Job) -> dict[str, object]:
    """Of these, what changes when an edge comes or goes."""
    rows = {edge.name: _examples_hash(edge.examples) for edge in job.edges if edge.examples is not None}
    return {**config_hashes(job.loaded), "rows": rows}


def check_unchanged(began_with: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Whether these hashes are those that a run began with.

    Raises: ResumeError naming what differs.
    """
    for key, got in _changes(began_with, now):
        raise ResumeError(
            f"{_WHAT[key]} changed since the run began", where=f"hashes, {key}", got=got, expected="what the run began with",
            do="put back what was there, or begin a new run with `atoll train`",
        )  # fmt: skip


def changes_since(began_with: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs of all that a run reads, in words; the config, of which more can be said, is left out."""
    return [f"{_WHAT[key]}: {got}" for key, got in _changes(began_with, now) if key not in ("config_hash", "toml_hash")]


def _changes(began_with: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in now.items():
        before = began_with.get(key)
        if before == value:
            continue
        got = "no hash of it" if before is None else "another hash"
        if isinstance(before, dict) and isinstance(value, Mapping):
            others = [name for name in {**before, **value} if before.get(name) != value.get(name)]
            got = f"other rows of {few(others)}"
        yield key, got


def _examples_hash(examples: Examples) -> str:
    hasher = hashlib.sha256()
    for example in examples:
        hasher.update(f"{len(example)} {example.label}\n".encode())
        hasher.update(example.token_ids.tobytes())
        hasher.update(example.loss_mask.tobytes())
    return hasher.hexdigest()


def rows_hash(rows: Rows) -> str:
    """SHA-256 of all rows in their order."""
    hasher = hashlib.sha256()
    for number in range(len(rows)):
        hasher.update(json.dumps(dict(rows[number]), default=str).encode() + b"\n")
    return hasher.hexdigest()


def _json_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(finite(value), sort_keys=True).encode()).hexdigest()
