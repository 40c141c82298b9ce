"""atoll fleet join: an edge's machine takes part, with one process that holds base, rows and state and calls the coordinator itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from atoll.config.document import few
from atoll.config.load import LoadedConfig, load
from atoll.errors import ConflictError
from atoll.fleet.files import EdgeFile, EdgeFolder
from atoll.fleet.links.node import serve
from atoll.fleet.links.resident import Resident
from atoll.jobs.backends.edge_policy import POLICY_FILE, read_policy
from atoll.jobs.backends.worker import Worker
from atoll.jobs.split import HostAccess
from atoll.report.lines import describe_event
from atoll.runs.events import Advised, DataLoaded, EdgeFinished, Event, EventLog, HostLost, Observer, PhaseStarted, RoundStarted
from atoll.split.certificates import DeviceTls
from atoll.split.host.audit import Audit


def join(
    folder: Path, tell: Callable[[str], None], *, config: Path | None = None, overrides: Sequence[str] = (),
    stop: threading.Event,
) -> None:  # fmt: skip
    """Take part until `stop` is set; `tell` is told lines for people. `config`: instead of the run.toml in the folder.

    Raises: FleetFolderError; TransportError for certificates or a proxy that are of no use; what reading run.toml and the edge's rows
    raises; ResumeError where another process is this edge already.
    """
    edge_folder = EdgeFolder(folder)
    edge = edge_folder.read()
    with EventLog(folder / "events.jsonl", [_advice(tell)]) as log, opened(edge_folder, config, overrides, log) as resident:
        tell(f"{edge.name} is ready for {edge.superlink}; stop with Ctrl-C")
        serve(edge_folder, resident.answer, tell, stop)


def answer_once(folder: Path, question: bytes) -> bytes:
    """The edge's answer to one frame, in this process and without one that stays.

    Raises: as `join`.
    """
    with EventLog(folder / "events.jsonl") as log, opened(EdgeFolder(folder), None, (), log) as resident:
        return resident.answer(question)


def opened(folder: EdgeFolder, config: Path | None, overrides: Sequence[str], log: EventLog) -> Resident:
    """The edge whose folder this is, with its rows read and checked; its base is loaded when a first work order comes.

    Raises: as `join`.
    """
    edge = folder.read()
    # Code is this machine's own: what is installed here for something else is nothing that a run may name.
    loaded = load(config or folder.run_toml, overrides, environment=False)
    _check_named(loaded, edge)
    host = None if edge.host is None else HostAccess(edge.host, DeviceTls(folder.ca, folder.cert, folder.key))
    policy = read_policy(folder.path / POLICY_FILE)
    worker = Worker(loaded, edge.name, host, policy)
    for note in worker.notes:
        log.append(Advised(edge.name, note))
    return Resident(worker, folder.path / "state", log, Audit(folder.audit))


def _advice(tell: Callable[[str], None]) -> Observer:
    """Tells what an owner should know: what is done here, orders that were refused, rows that were left out."""

    def observe(event: Event) -> None:
        if isinstance(event, RoundStarted):
            tell(f"{event.phase} round {event.round} begins")
        elif isinstance(event, Advised | DataLoaded | EdgeFinished | PhaseStarted | HostLost):
            tell(describe_event(event))

    return observe


def _check_named(loaded: LoadedConfig, edge: EdgeFile) -> None:
    names = [one.name for one in loaded.config.edge]
    if edge.name not in names:
        raise ConflictError(
            "run.toml does not know this edge", where=str(loaded.path),
            got=f"no [[edge]] called {edge.name!r}, but {few(names) or 'none'}", expected=f'[[edge]] with name = "{edge.name}"',
            do="use the run.toml that `atoll fleet init` was given, or write the fleet's folders again",
        )  # fmt: skip
