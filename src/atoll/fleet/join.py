"""atoll fleet join: an edge's machine takes part, with a process that holds base, rows and state, and a SuperNode beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from atoll.config.load import LoadedConfig, load
from atoll.errors import ConflictError
from atoll.fleet.files import EdgeFile, EdgeFolder
from atoll.fleet.links.resident import Resident
from atoll.fleet.links.sockets import RESIDENT, LocalServer
from atoll.fleet.processes import Child, command, flower_environment, free_port
from atoll.jobs.backends.edge_policy import POLICY_FILE, read_policy
from atoll.jobs.backends.worker import Worker
from atoll.jobs.split import HostAccess
from atoll.report.lines import describe_event
from atoll.runs.events import Advised, EventLog, Observer
from atoll.split.certificates import DeviceTls

_LONGEST_WAIT = 8.0


def join(
    folder: Path, tell: Callable[[str], None], *, config: Path | None = None, overrides: Sequence[str] = (),
    stop: threading.Event,
) -> None:  # fmt: skip
    """Take part until `stop` is set; `tell` is told lines for people. `config`: instead of the run.toml in the folder.

    Raises: FleetFolderError; what reading run.toml and the edge's rows raises; ResumeError where another process is this edge already.
    """
    edge_folder = EdgeFolder(folder)
    edge = edge_folder.read()
    with EventLog(folder / "events.jsonl", [_advice(tell)]) as log, opened(edge_folder, config, overrides, log) as resident:
        server = LocalServer(RESIDENT, {"Answer": resident.answer})
        try:
            _serve(edge_folder, edge, server.address, tell, stop)
        finally:
            server.close()


def answer_once(folder: Path, question: bytes) -> bytes:
    """The edge's answer to one frame, in this process and without one that stays.

    Raises: as `join`.
    """
    with EventLog(folder / "events.jsonl") as log, opened(EdgeFolder(folder), None, (), log) as resident:
        return resident.answer(question)


def opened(folder: EdgeFolder, config: Path | None, overrides: Sequence[str], log: EventLog) -> Resident:
    """The edge whose folder this is, with its rows read and checked; its base is loaded when a first order comes.

    Raises: as `join`.
    """
    edge = folder.read()
    # Code is this machine's own: what is installed here for something else is nothing that a run may name.
    loaded = load(config or folder.run_toml, overrides, environment=False)
    _check_named(loaded, edge)
    host = None if edge.host is None else HostAccess(edge.host, DeviceTls(folder.ca, folder.cert, folder.key))
    policy = read_policy(folder.path / POLICY_FILE)
    return Resident(Worker(loaded, edge.name, host, policy), folder.path / "state", log)


def _advice(tell: Callable[[str], None]) -> Observer:
    """Tells what an owner should know, such as orders that were refused."""
    return lambda event: tell(describe_event(event)) if isinstance(event, Advised) else None


def _serve(folder: EdgeFolder, edge: EdgeFile, resident: str, tell: Callable[[str], None], stop: threading.Event) -> None:
    wait = 1.0
    node = _node(folder, edge, resident)
    tell(f"{edge.name} is ready for {edge.superlink}; stop with Ctrl-C")
    try:
        while not stop.wait(0.2):
            if node.status is None:
                continue
            last = (node.said().strip().splitlines() or ["no output"])[-1]
            tell(f"the SuperNode ended with status {node.status} ({last}); it is started again in {wait:g} s; its log is {node.log}")
            if stop.wait(wait):
                return
            wait = min(2 * wait, _LONGEST_WAIT)
            node = _node(folder, edge, resident)
    finally:
        node.stop()


def _node(folder: EdgeFolder, edge: EdgeFile, resident: str) -> Child:
    home = folder.path / "flower"
    home.mkdir(mode=0o700, exist_ok=True)
    return Child("SuperNode", [
        command("flower-supernode"), "--root-certificates", str(folder.ca), "--superlink", edge.superlink,
        "--auth-supernode-private-key", str(folder.node_key), "--node-config", f'edge="{edge.name}" resident="{resident}"',
        "--host", "127.0.0.1", "--port", str(free_port()),
    ], folder.path / "supernode.log", flower_environment(home.resolve()))  # fmt: skip


def _check_named(loaded: LoadedConfig, edge: EdgeFile) -> None:
    names = [one.name for one in loaded.config.edge]
    if edge.name not in names:
        raise ConflictError(
            "run.toml does not know this edge", where=str(loaded.path), got=", ".join(names) or "no [[edge]]", expected=edge.name,
            do="use the run.toml that `atoll fleet init` was given, or write the fleet's folders again",
        )  # fmt: skip
