"""The coordinator's Flower side: SuperLink and the front before it, the nodes it knows, and the app run; what is lost is brought back."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from atoll.errors import HostLostError
from atoll.fleet.files import CoordinatorFolder
from atoll.fleet.front.limits import READY
from atoll.fleet.links.carrier import carry
from atoll.fleet.links.flower import FAILURES, LocalSuperLink
from atoll.fleet.links.relay import Relay
from atoll.fleet.processes import Child
from atoll.runs.files import write_json

log = logging.getLogger(__name__)
_SUPERLINK_READY, _START_SECONDS = "Uvicorn running", 60.0
_NODES = "nodes.json"
_TRIED_AGAIN_AFTER = (1.0, 2.0, 4.0, 8.0)
_LOOK_SECONDS = 1.0
_LONGEST_SOCKET = 100
"""Characters that the system takes for a socket's path, with some to spare."""
_ENVIRONMENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


class SuperLink:
    """SuperLink on a Unix socket of this user's alone, and the front that edges call, for as long as this context lasts.

    SuperLink's own authentication of nodes stays on behind the front. Flower runs no app: this process is the ServerApp.

    Raises: HostLostError where one of them does not start.
    """

    def __init__(self, folder: CoordinatorFolder, tell: Callable[[str], None]) -> None:
        self._folder, self._tell = folder, tell
        self._fleet, self._state = folder.read(), folder.path.resolve() / "superlink"
        self._nodes = self._known()
        if not set(self._fleet.edges) <= set(self._nodes):
            # A coordinator that was killed while it registered edges leaves some that cannot be registered again: all begin anew.
            shutil.rmtree(self._state, ignore_errors=True)
            self._nodes = {}
        self._own = _private_folder()
        self._socket = Path(self._fleet.socket) if self._fleet.socket else self._own / "superlink"
        self.relay, self._stopping = Relay(), threading.Event()
        self.gone: set[str] = set()
        """Edges that were removed while this ran."""
        self._link = self._superlink()
        self._front: Child | None = None
        self._keeper: threading.Thread | None = None
        self._carrier: threading.Thread | None = None
        try:
            self._front = None if self._fleet.socket else self._first_front()
            self._link.wait_for(_SUPERLINK_READY, _START_SECONDS)
        except HostLostError:
            self.close()
            raise

    def __enter__(self) -> SuperLink:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def nodes(self) -> dict[int, str]:
        """The edges by node id: each is registered with its public key, once.

        Raises: HostLostError where SuperLink refuses a key.
        """
        with LocalSuperLink(self._socket) as control:
            for edge in self._fleet.edges:
                if edge in self._nodes:
                    continue
                try:
                    self._nodes[edge] = control.register(edge, self._folder.node_public(edge))
                except (*FAILURES, OSError) as problem:
                    raise HostLostError("an edge cannot be registered", where=edge, got=str(problem)) from None
                write_json(self._state / _NODES, self._nodes)
        self._take_off_the_removed()
        return {node: edge for edge, node in self._nodes.items()}

    def carry(self) -> None:
        """Have messages carried, and see that they always are."""
        self._carrier = self._carrying()
        self._keeper = threading.Thread(target=self._keep, name="atoll-superlink", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """End the app run, the front and SuperLink; may be called twice."""
        self._stopping.set()
        self.relay.close()
        for thread in (self._keeper, self._carrier):
            if thread is not None:
                thread.join()
        for child in (self._front, self._link):
            if child is not None:
                child.stop()
        shutil.rmtree(self._own, ignore_errors=True)

    def _known(self) -> dict[str, int]:
        """The node ids of edges that were registered."""
        path = self._state / _NODES
        known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        return known

    def _take_off_the_removed(self) -> None:
        """Of the nodes, those whose public keys `atoll fleet remove` took out of the folder."""
        for edge in [edge for edge in self._nodes if not self._folder.node_public(edge).exists()]:
            with contextlib.suppress(*FAILURES), LocalSuperLink(self._socket) as control:
                control.unregister(self._nodes[edge])
            self.gone.add(edge)
            self.relay.leave(self._nodes.pop(edge), f"{edge} is of the fleet no more")
            write_json(self._state / _NODES, self._nodes)
            self._tell(f"{edge} is of the fleet no more")

    def _superlink(self) -> Child:
        self._state.mkdir(mode=0o700, exist_ok=True)
        environment = {**os.environ, **_ENVIRONMENT, "FLWR_HOME": str(self._state), "FLWR_DATABASE": str(self._state / "state.db")}
        return Child("SuperLink", [
            sys.executable, "-m", "uvicorn", "--factory", "atoll.fleet.links.flower:superlink_app", "--uds", str(self._socket),
            "--no-access-log", "--timeout-keep-alive", "75",
        ], self._state / "superlink.log", environment)  # fmt: skip

    def _new_front(self) -> Child:
        front = Child("the fleet's front", [
            sys.executable, "-m", "atoll.fleet.front", str(self._folder.path), str(self._socket)
        ], self._state / "front.log")  # fmt: skip
        try:
            front.wait_for(READY, _START_SECONDS)
        except HostLostError:
            front.stop()
            raise
        return front

    def _first_front(self) -> Child:
        """Of a coordinator that was killed, the front may still be on its way out."""
        for seconds in _TRIED_AGAIN_AFTER:
            with contextlib.suppress(HostLostError):
                return self._new_front()
            time.sleep(seconds)
        return self._new_front()

    def _carrying(self) -> threading.Thread:
        def run() -> None:
            try:
                with LocalSuperLink(self._socket) as control, control.begin(self._folder.app) as grid:
                    carry(grid, self.relay)
            except (*FAILURES, OSError):  # SuperLink is gone: the next one that carries asks anew.
                log.info("the app run has ended", exc_info=True)

        thread = threading.Thread(target=run, name="atoll-carrier", daemon=True)
        thread.start()
        return thread

    def _keep(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            # What fails now is tried again in a second.
            with contextlib.suppress(HostLostError):
                if self._link.status is not None:
                    self._tell("SuperLink was lost: it is started again")
                    self._link = self._superlink()
                    self._link.wait_for(_SUPERLINK_READY, _START_SECONDS)
                if self._front is not None and self._front.status is not None:
                    self._tell("the fleet's front was lost: it is started again")
                    self._front = self._new_front()
                if self._carrier is not None and not self._carrier.is_alive():
                    self._tell("the app run has ended, and another begins: what is open is asked again")
                    self._carrier = self._carrying()
                self._take_off_the_removed()


def _private_folder() -> Path:
    """For a socket: this user's alone, and with a path as short as the system needs it."""
    folder = Path(tempfile.mkdtemp(prefix="atoll-"))
    if len(str(folder / "superlink")) <= _LONGEST_SOCKET:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="atoll-", dir="/tmp"))
