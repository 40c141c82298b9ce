"""The coordinator's Flower side: SuperLink, the nodes it knows, and the app run that carries messages; what is lost is brought back."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from atoll.errors import HostLostError
from atoll.fleet.files import CONNECTION, CoordinatorFolder
from atoll.fleet.links.relay import Relay
from atoll.fleet.processes import Child, command, flower_environment, run_once
from atoll.runs.files import write_json

_READY, _START_SECONDS = "Uvicorn running", 60.0
_NODES = "nodes.json"
_TRIED_AGAIN_AFTER = (1.0, 2.0, 4.0, 8.0)
_SERVED_SECONDS = 180.0
"""So long an app run may take to come for messages: one that ended before it came is told by nobody."""


class SuperLink:
    """SuperLink with TLS and node authentication, for as long as this context lasts."""

    def __init__(self, folder: CoordinatorFolder, tell: Callable[[str], None]) -> None:
        self._folder, self._tell = folder, tell
        self._address = folder.read().address
        self._state, self._edges = folder.path / "superlink", folder.read().edges
        self._environment = flower_environment(folder.flower.resolve())
        self._stopping, self._lost = threading.Event(), threading.Event()
        if not set(self._edges) <= set(self._known()):
            # A coordinator that was killed while it registered edges leaves some that cannot be registered again: all begin anew.
            shutil.rmtree(self._state, ignore_errors=True)
        self._link = self._first_started()
        self.relay, self._served_by = Relay(self._lost.set), math.inf
        self._keeper: threading.Thread | None = None

    def __enter__(self) -> SuperLink:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def nodes(self) -> dict[int, str]:
        """The edges by node id: each is registered with its public key, once."""
        known = self._known()
        for edge in self._edges:
            if edge in known:
                continue
            public = str(self._folder.node_public(edge))
            arguments = [command("flwr"), "supernode", "register", public, CONNECTION, "--name", edge, "--format", "json"]
            known[edge] = int(self._said(arguments, "an edge cannot be registered", edge)["node-id"])
            write_json(self._state / _NODES, known)
        return {node: edge for edge, node in known.items()}

    def _known(self) -> dict[str, int]:
        """The node ids of edges that are registered."""
        path = self._state / _NODES
        known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        return known

    def carry(self) -> None:
        """Start the app run that carries messages, and see that there is always one."""
        self._submit()
        self._keeper = threading.Thread(target=self._keep, name="atoll-superlink", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """End the app run and SuperLink; may be called twice."""
        self._stopping.set()
        self._lost.set()
        self.relay.close()
        if self._keeper is not None:
            self._keeper.join()
        self._link.stop()

    def _first_started(self) -> Child:
        """Of a coordinator that was killed, SuperLink may still be on its way out."""
        for seconds in _TRIED_AGAIN_AFTER:
            with contextlib.suppress(HostLostError):
                return self._started()
            time.sleep(seconds)
        return self._started()

    def _started(self) -> Child:
        host, _, port = self._address.rpartition(":")
        folder = self._folder
        self._state.mkdir(exist_ok=True)
        link = Child("SuperLink", [
            command("flower-superlink"), "--host", _listened_on(host), "--port", port, "--ssl-certfile", str(folder.cert),
            "--ssl-keyfile", str(folder.key), "--ssl-ca-certfile", str(folder.ca), "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", "--database", str(self._state / "state.db"),
        ], self._state / "superlink.log", self._environment)  # fmt: skip
        try:
            link.wait_for(_READY, _START_SECONDS)
        except HostLostError:
            link.stop()
            raise
        return link

    def _submit(self) -> None:
        settings = f'relay="{self.relay.address}" epoch={self.relay.next_epoch()}'
        arguments = [command("flwr"), "run", str(self._folder.app), CONNECTION, "--format", "json", "--run-config", settings]
        self._said(arguments, "SuperLink does not run the app", self._address)
        self._served_by = time.monotonic() + _SERVED_SECONDS

    def _said(self, arguments: Sequence[str], what: str, where: str) -> dict[str, Any]:
        """What a command of Flower's answers."""
        text = run_once(arguments, self._environment)
        try:
            said: dict[str, Any] = json.loads(text)
        except ValueError:
            said = {"error-message": text}
        if not said.get("success"):
            raise HostLostError(what, where=where, got=str(said.get("error-message", said)).strip())
        return said

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self._lost.wait(1.0)
            if self._stopping.is_set():
                return
            gone = self._link.status is not None
            never_came = not self.relay.is_served and time.monotonic() > self._served_by
            if not gone and not self._lost.is_set() and not never_came:
                continue
            self._lost.clear()
            self._tell("SuperLink was lost: it is started again" if gone else "the app run was lost: another is started")
            # What fails now is tried again in a second.
            with contextlib.suppress(HostLostError):
                if gone:
                    self._link = self._started()
                self._submit()
                continue
            self._lost.set()
            self._stopping.wait(1.0)


def _listened_on(host: str) -> str:
    """A name or another machine's view of this one cannot be bound to; a loopback address can, and need not be left."""
    return host if host in ("127.0.0.1", "localhost", "::1") else "0.0.0.0"
