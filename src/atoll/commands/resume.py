"""atoll resume: go on with a run that was stopped, as if it had not been."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.commands.train import RunResult, go_on, track
from atoll.config.load import LoadedConfig
from atoll.errors import ResumeError
from atoll.jobs.backends.backend import BackendFactory
from atoll.jobs.backends.members import with_those_gone
from atoll.jobs.job import Job, prepared
from atoll.jobs.results.config import check_begun_with, run_config
from atoll.jobs.results.trained_on import check_trained_on
from atoll.jobs.resume_state import check_unchanged, config_hashes, find_resume_point, hashes_of
from atoll.jobs.split import HostAccess
from atoll.runs.disk import disk_told
from atoll.runs.events import Advised, Event, EventLog, Resumed
from atoll.runs.layout import RunDirectory, read_object
from atoll.runs.summary import read_summary, versions

Begin = Callable[[LoadedConfig, str], tuple[Job, BackendFactory | None]]
"""Makes the job of a config and a run's id ready, and says who makes its backends; None: in this process."""


def resume(
    run_dir: str | Path, *, observers: Sequence[Callable[[Event], None]] = (), host: HostAccess | None = None, trust: bool = False
) -> RunResult:  # fmt: skip
    """Go on with a run after its last whole checkpoint, with the config that it began with; a run without one begins again.

    The adapter comes out bit for bit as if the run had not been stopped. A run that is complete is left as it is, and observers are told.

    Raises: TrustError where the run names code and `trust` does not say that it may; RunFolderError; ResumeError where another process
    works on it, or what it began with has changed; and as `atoll.train`.
    """
    return resume_by(run_dir, lambda loaded, _: (prepared(loaded, host), None), observers, has_host=host is not None, trust=trust)


def resume_by(
    run_dir: str | Path, begin: Begin, observers: Sequence[Callable[[Event], None]], *, has_host: bool = False, on_fleet: bool = False,
    trust: bool = False,
) -> RunResult:  # fmt: skip
    """The same with a job, and backends, that `begin` makes."""
    run = RunDirectory.open(Path(run_dir))
    loaded, noted = run_config(run, trust=trust, loads_parts=True), run.read_config()
    began_with = _began_with(run, noted)
    if run.summary_path.is_file() and (summary := read_summary(run.summary_path)).status == "complete":
        for observer in observers:
            observer(Advised("", "the run is complete: nothing is left to do"))
        return RunResult(run.path, run.adapter, summary, tuple(sorted(run.path.glob("report/*"))))
    check_unchanged(began_with, config_hashes(loaded))
    check_begun_with(run, noted, has_host=has_host, on_fleet=on_fleet)
    with disk_told(run), EventLog(run.events_path, observers) as log:
        job, make_backend = begin(loaded, str(noted.get("run_id", "")))
        try:
            return _resumed(job, run, log, began_with, noted, make_backend)
        finally:
            job.close()


def _resumed(
    job: Job, run: RunDirectory, log: EventLog, began_with: Mapping[str, Any], noted: Mapping[str, Any], make_backend: BackendFactory | None
) -> RunResult:  # fmt: skip
    hashes = hashes_of(job)
    check_unchanged(began_with, hashes)
    if "began" in noted:  # Edges have come or gone.
        job = with_those_gone(job, read_object(run.plan_json))
    check_trained_on(run, job.base, job.config, "begin a new run with `atoll train`")
    resume_point, passed = find_resume_point(run, hashes)
    track(job, run, log)
    log.append(Resumed(0 if resume_point is None else resume_point.round))
    for advice in passed:
        log.append(Advised("", advice))
    now = versions()
    for name, before in noted.get("versions", {}).items():
        if now.get(name) != before:
            log.append(Advised("", f"the run began with {name} {before}, and goes on with {now.get(name)}: its last bits may differ"))
    return go_on(job, run, log, hashes, resume_point=resume_point, make_backend=make_backend)


def _began_with(run: RunDirectory, noted: Mapping[str, object]) -> Mapping[str, Any]:
    hashes = noted.get("hashes")
    if not isinstance(hashes, dict):
        raise ResumeError(
            "the run does not say what it began with", where=str(run.config_json), got="no hashes",
            expected="hashes of config, base and data", do="begin a new run with `atoll train`",
        )  # fmt: skip
    return hashes
