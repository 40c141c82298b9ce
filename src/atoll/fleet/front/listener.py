"""Connections to the front: TLS with a certificate of the fleet, and then heads of requests, each within some seconds; and not too many."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from atoll.fleet.files import CoordinatorFolder
from atoll.fleet.front.admission import Admission, Visitor
from atoll.fleet.front.limits import Limits
from atoll.split.host.audit import Audit

log = logging.getLogger("atoll.front")
_TOLD_SECONDS = 60.0
_PAUSE_SECONDS = 0.2


def tls_of(folder: CoordinatorFolder) -> ssl.SSLContext:
    """TLS under the coordinator's certificate, for those alone that show one of the fleet's authority for devices.

    Raises: OSError, ssl.SSLError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder.cert, folder.key)
    context.load_verify_locations(folder.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


class Listener:
    """Takes connections, and hands the requests of those who may come in to an application."""

    def __init__(self, app: Callable[..., Any], tls: ssl.SSLContext, admission: Admission, limits: Limits, audit: Audit) -> None:
        self._tls, self._limits, self._audit = tls, limits, audit
        # Of a head h11 itself keeps no more than this.
        self._config = Config(
            app, ws="none", lifespan="off", proxy_headers=False, access_log=False, log_config=None, server_header=False, date_header=False,
            h11_max_incomplete_event_size=limits.head_bytes, timeout_keep_alive=int(limits.idle_seconds),
        )  # fmt: skip
        self._config.load()
        self._state, self._admission, self._by_name = ServerState(), admission, Counter[str]()
        self._new: dict[asyncio.Task[None], socket.socket] = {}
        """Connections that have shown no certificate yet, the oldest first."""
        self._refused = 0

    async def serve(self, listening: socket.socket) -> None:
        """Take connections until cancelled."""
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        counting = loop.create_task(self._tell_refused())
        try:
            while True:
                try:
                    connection, peer = await loop.sock_accept(listening)
                except OSError:  # Out of descriptors: those that have shown nothing give theirs back.
                    self._refused += 1
                    self._close_oldest()
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                if len(self._new) >= self._limits.handshakes:
                    self._close_oldest()
                task = loop.create_task(self._secured(connection, _shown(peer)))
                self._new[task] = connection
                task.add_done_callback(lambda task: self._new.pop(task, None))
        finally:
            counting.cancel()
            for visiting in list(self._state.connections):
                visiting.transport.abort()

    def _close_oldest(self) -> None:
        if oldest := next(iter(self._new), None):
            with contextlib.suppress(OSError):  # Its transport, which owns it, sees the end and lets it go.
                self._new.pop(oldest).shutdown(socket.SHUT_RDWR)

    async def _secured(self, connection: socket.socket, peer: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                self._protocol, connection, ssl=self._tls, ssl_handshake_timeout=self._limits.handshake_seconds,
                ssl_shutdown_timeout=self._limits.handshake_seconds,
            )  # fmt: skip
        except OSError:
            self._refused += 1
            self._audit.note("handshake refused", "", peer, {})

    def _protocol(self) -> _Connection:
        return _Connection(self._config, self._state, self._admission, self._by_name, self._limits, self._audit)

    async def _tell_refused(self) -> None:
        """One line a minute, however many there were: a log must not grow by the will of strangers."""
        while True:
            await asyncio.sleep(_TOLD_SECONDS)
            if self._refused:
                log.info("%d connections showed no certificate of this fleet, or nothing in time", self._refused)
                self._refused = 0


class _Connection(H11Protocol):
    """uvicorn's, with a visitor, and a time for the head of a request."""

    def __init__(
        self, config: Config, state: ServerState, admission: Admission, by_name: Counter[str], limits: Limits, audit: Audit
    ) -> None:
        super().__init__(config, state, {})
        self._admission, self._by_name, self._limits, self._audit = admission, by_name, limits, audit
        self._head: asyncio.TimerHandle | None = None
        self._visitor: Visitor | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let in who may come in; hang up on others."""
        super().connection_made(transport)
        visitor = Visitor.of(transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
        why, peer = self._admission.refusal(visitor), _shown(transport.get_extra_info("peername"))
        if why is None and self._by_name[visitor.name] >= self._limits.edge_connections:
            why = "too many connections"
        if why is not None:
            log.info("%s is not let in: %s", visitor.name or f"certificate {visitor.serial:x}", why)
            self._audit.note("not let in", visitor.name, peer, {"certificate": f"{visitor.serial:x}", "why": why})
            transport.abort()
            return
        self._audit.note("let in", visitor.name, peer, {"certificate": f"{visitor.serial:x}"})
        self._visitor = visitor
        self._by_name[visitor.name] += 1
        self.app_state = {"visitor": visitor, "abort": transport.abort}
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the visitor."""
        super().connection_lost(exc)
        self._forget_head()
        if self._visitor is not None:
            self._by_name[self._visitor.name] -= 1
            self._visitor = None

    def data_received(self, data: bytes) -> None:
        """Take bytes of a visitor; those of anybody else are dropped."""
        if self._visitor is None:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head is None:
            self._await_head()

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self._limits.head_seconds, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


def _shown(peer: Any) -> str:
    """Address and port."""
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""
