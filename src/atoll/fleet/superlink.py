"""The coordinator's Flower side: SuperLink and the front before it, the nodes it knows, and the app run; what is lost is brought back."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from atoll.errors import FleetFolderError, HostLostError
from atoll.fleet.files import CoordinatorFolder
from atoll.fleet.front.limits import READY
from atoll.fleet.links.carrier import carry
from atoll.fleet.links.flower import FAILURES, KnownNode, LocalSuperLink, public_key
from atoll.fleet.links.relay import Relay
from atoll.fleet.processes import Child

log = logging.getLogger(__name__)
_SUPERLINK_READY, _START_SECONDS = "Uvicorn running", 60.0
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
        self._nodes: dict[str, KnownNode] = {}
        """What SuperLink believes, by edge, as it was seen last."""
        self._away: set[str] = set()
        self._told_away: set[str] = set()
        """Of these, not those that were away before this began."""
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
        """The edges by node id: of each, the public key in the coordinator's folder is registered, and no other.

        Raises: HostLostError where SuperLink refuses a key; FleetFolderError.
        """
        try:
            self._register()
        except HostLostError:
            # A key that was believed, and then not, is not taken again (of an edge that was brought back from a copy): all begin anew.
            self._begin_anew()
            self._register()
        return {node.number: edge for edge, node in self._nodes.items()}

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

    def _register(self) -> None:
        """Have SuperLink believe the keys in the folder, and no others."""
        with LocalSuperLink(self._socket) as control:
            try:
                self._forget(control, self._keys())
                known = {node.edge for node in control.nodes()}
            except FAILURES as problem:
                raise HostLostError("SuperLink does not say whom it knows", where=str(self._state), got=str(problem)) from None
            for edge, key in self._keys().items():
                try:
                    if edge not in known:
                        control.register(edge, key)
                except FAILURES as problem:
                    raise HostLostError(
                        "an edge cannot be registered", where=str(self._folder.node_public(edge)), got=str(problem),
                        expected="a public key that no other edge has", do="copy node.pub of the edge there",
                    ) from None  # fmt: skip
            self._nodes = {node.edge: node for node in control.nodes()}
        self._away = {edge for edge, node in self._nodes.items() if node.has_left}

    def _begin_anew(self) -> None:
        self._link.stop()
        for path in self._state.glob("state.db*"):
            path.unlink()
        self._link = self._superlink()
        self._link.wait_for(_SUPERLINK_READY, _START_SECONDS)

    def _keys(self) -> dict[str, bytes]:
        """The edges of the fleet with their public keys; one whose key is not in the folder is kept out."""
        found = {}
        for edge in self._fleet.edges:
            path = self._folder.node_public(edge)
            try:
                if path.exists():
                    found[edge] = public_key(path)
            except (OSError, ValueError) as problem:
                raise FleetFolderError(
                    "no public key of an edge", where=str(path), got=str(problem), expected="node.pub of the edge", do="copy it there"
                ) from None
        return found

    def _forget(self, control: LocalSuperLink, keys: Mapping[str, bytes]) -> list[str]:
        """Have SuperLink believe no key any more that is not its edge's now: of edges that were removed, also if they were added again."""
        old = [node for node in control.nodes() if keys.get(node.edge) != node.key]
        for node in old:
            control.unregister(node.number)
        return [node.edge for node in old]

    def _look(self) -> None:
        """Who was removed since, and who said goodbye."""
        begin = time.monotonic()
        with LocalSuperLink(self._socket) as control:
            for edge in self._forget(control, self._keys()):
                if edge in self._nodes:
                    self.gone.add(edge)
                    self.relay.leave(self._nodes.pop(edge).number, f"{edge} is of the fleet no more")
                    self._tell(f"{edge} is of the fleet no more")
            away = {node.edge: node.number for node in control.nodes() if node.has_left and node.edge in self._nodes}
        self.relay.are_away(away.values(), begin)
        left, back = away.keys() - self._away, self._told_away - away.keys()
        for edge in sorted(left):
            self._tell(f"{edge} left; rounds that have enough others go on without it until it is there again")
        for edge in sorted(back - self.gone):
            self._tell(f"{edge} is there again")
        self._away, self._told_away = set(away), (self._told_away | left) - back

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
            with contextlib.suppress(HostLostError, FleetFolderError, *FAILURES):
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
                self._look()


def _private_folder() -> Path:
    """For a socket: this user's alone, and with a path as short as the system needs it."""
    folder = Path(tempfile.mkdtemp(prefix="atoll-"))
    if len(str(folder / "superlink")) <= _LONGEST_SOCKET:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="atoll-", dir="/tmp"))
