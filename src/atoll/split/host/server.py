"""A host: a gRPC server that gives every device a session on one shared base."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc

from atoll.cost.meters import resident_bytes
from atoll.errors import AtollError, TransportError
from atoll.split.authority.revocation import Revoked
from atoll.split.counted_stream import CountedStream
from atoll.split.cut import Cut
from atoll.split.host.audit import Audit, in_words
from atoll.split.host.base_part import AT_ONCE, AT_ONCE_OF_TENANT, PartLimit, Parts
from atoll.split.host.host_account import HostAccount
from atoll.split.host.limits.budgets import HOLD_SECONDS, Budgets, Over, Use
from atoll.split.host.session import HostSession, Served, SessionFigures
from atoll.split.host.tenants import Call, Door, HostLimits
from atoll.split.transport import OPTIONS, SERVICE, Alarm, ServerTransport
from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import Dialogue
from atoll.wire.frames import Message, Packer
from atoll.wire.handshake import reason_of

STOP_SECONDS = 2.0
HELLO_SECONDS = 10.0
STATUS_SECONDS = 60.0
"""A device may pad its request to time the link."""
STATUS_AT_ONCE, STATUS_AT_ONCE_OF_TENANT = 8, 2
SERVER_OPTIONS = (
    # Else two hosts could listen on one port, and a device would meet now the one, now the other.
    ("grpc.so_reuseport", 0),
    # From the first byte of a connection to the last of TLS and of HTTP/2's greeting; gRPC's own limit is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Of one connection. More are waited with by the caller.
    ("grpc.max_concurrent_streams", 32),
    # A connection without a call is closed; gRPC's clients make another when they need one.
    ("grpc.max_connection_idle_ms", 300_000),
)
log = logging.getLogger(__name__)


class Host:
    """Serves until `stop`. `credentials` None: without TLS; `revoked`: whose certificates are believed no more."""

    def __init__(
        self, served: Served, limits: HostLimits, listen: str, credentials: grpc.ServerCredentials | None, audit: Audit | None = None,
        revoked: Revoked | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._served, self._limits, self._audit = served, limits, audit or Audit(None)
        self.account, self.budgets, self._started = HostAccount(limits), Budgets(limits.of, clock), time.monotonic()
        self._threads: set[threading.Thread] = set()
        self._at_stop: list[Callable[[], None]] = []
        part_limit = PartLimit(served.facts(Cut(0, 0)).num_blocks, limits.max_part)
        parts = Parts(served.source, part_limit, self.budgets, served.compute_queue, self._audit)

        def most_of_tenant(tenant: str) -> int:
            # As many again as there are sessions may wait for room, or be told that there is none.
            return 2 * (limits.of(tenant).sessions or limits.max_sessions) + 2

        common = (self.budgets, self._audit, revoked)
        self._doors = (
            Door("Train", self._train, 2 * limits.max_sessions + 8, most_of_tenant, *common),
            Door("Part", parts.serve, AT_ONCE, lambda tenant: AT_ONCE_OF_TENANT, *common),
            Door("Status", self._status, STATUS_AT_ONCE, lambda tenant: STATUS_AT_ONCE_OF_TENANT, *common),
        )
        # Every door has threads of its own; of these only calls of unknown methods would make use.
        self._server = grpc.server(ThreadPoolExecutor(1, thread_name_prefix="atoll-grpc"), options=(*OPTIONS, *SERVER_OPTIONS))
        handlers = {door.name: door.handler() for door in self._doors}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        _check_free(listen)
        try:
            self.port = self._server.add_insecure_port(listen) if credentials is None else self._server.add_secure_port(listen, credentials)
        except RuntimeError as problem:
            raise _no_listening(listen, str(problem).splitlines()[0]) from None

    def start(self) -> None:
        """Begin to serve; returns at once."""
        self._server.start()
        self._audit.note("host started", "", "", {"port": self.port})

    def stop(self) -> None:
        """End all sessions; their devices find the host gone and wait for it."""
        self._server.stop(STOP_SECONDS).wait()
        for door in self._doors:
            door.close()
        for thread in tuple(self._threads):
            if thread.is_alive():  # Not so where its session is opened at this very moment, to find the call at its end.
                thread.join(STOP_SECONDS)
        for action in self._at_stop:
            action()
        self._at_stop.clear()
        self._audit.note("host stopped", "", "", {})
        self._audit.close()

    def at_stop(self, action: Callable[[], None]) -> None:
        """Do this when the host stops."""
        self._at_stop.append(action)

    def status(self, tenant: str | None = None) -> pb.StatusReply:
        """What the host serves and how busy it is; with a tenant, the list of sessions is only of that tenant's."""
        facts, totals, now = self._served.facts(Cut(0, 0)), self.account.totals(), time.monotonic()
        return pb.StatusReply(
            protocol=facts.protocol, atoll_version=facts.atoll_version, base_digest=self._served.base_digest(Cut(0, 0)),
            tokenizer_digest=facts.tokenizer_digest, num_blocks=facts.num_blocks, bits=self._served.bits, precision=facts.precision,
            codecs=facts.codecs, wire_modes=facts.wire_modes, adapter_kinds=facts.kinds, max_tokens=facts.max_tokens,
            max_rank=facts.max_rank, sessions=totals.sessions, max_sessions=self._limits.max_sessions,
            uptime_seconds=now - self._started, tokens=totals.tokens, tokens_per_second=self.account.tokens_per_second(),
            resident_bytes=resident_bytes(), open=[_session_status(figures, now) for figures in self.account.sessions(tenant)],
            tenants=[
                _tenant_status(name, use, len(self.account.sessions(name))) for name, use in self.budgets.uses(tenant).items()
            ],
            cache_bytes=totals.cache_bytes, max_cache_bytes=self._served.shelf.most_bytes,
        )  # fmt: skip

    def _train(self, call: Call) -> Iterator[bytes]:
        over = self.budgets.of(call.tenant).over_bytes()
        if over is not None:
            self.account.refused(call.tenant, "busy")
        figures = over or self.account.open(call.tenant)
        yield from self._busy(call, figures) if isinstance(figures, Over) else self._session(call, figures).outbox

    def _busy(self, call: Call, over: Over) -> Iterator[bytes]:
        self._audit.note("session refused", call.tenant, call.peer, reason_of(over.refusal()))
        alarm = Alarm(call.context.cancel)
        try:
            with alarm.within(HELLO_SECONDS):
                yield from Packer().frames(Message(over.refusal()))
        finally:
            alarm.close()

    def _session(self, call: Call, figures: SessionFigures) -> ServerTransport:
        """The transport of a session that now runs in a thread of its own."""
        served = self._served_to(call.tenant)
        # Until it has said who it is, a device has less time.
        transport = ServerTransport(call.requests, call.context.cancel, min(HELLO_SECONDS, served.idle_seconds))
        if not call.context.add_callback(transport.close):
            transport.close()  # The device is gone already, and nobody else would end the transport's thread.
        stream, account = CountedStream(Dialogue("host"), transport, "fp32"), self.budgets.of(call.tenant)

        def hold(over: Over) -> None:
            # Once for its user to know; and wherever the device would come to ask itself whether the host is still there.
            if over.seconds > HOLD_SECONDS or not stream.sent_bytes["wait"]:
                stream.send(over.wait())
            transport.pause(min(over.seconds, HOLD_SECONDS))

        def run() -> None:
            self._audit.note("session opened", call.tenant, call.peer, {"session": figures.session})
            try:
                HostSession(served, stream, figures, lambda num_positions: account.admit(num_positions, hold)).run()
            finally:
                code = "idle" if transport.silent else "" if figures.refusal is None else figures.refusal.code
                self.account.end(figures, code)
                self._threads.discard(threading.current_thread())
                self._audit.note("session ended", call.tenant, call.peer, _told(figures, code))
                log.info("session of %s ended: %s", call.tenant or "a device without a certificate", in_words(_told(figures, code)))

        thread = threading.Thread(target=run, name=f"atoll-session-{figures.session}", daemon=True)
        self._threads.add(thread)
        thread.start()
        return transport

    def _served_to(self, tenant: str) -> Served:
        """The same to all, but for how long it waits for them."""
        limits, usual = self._limits.of(tenant), self._served
        return replace(
            usual, idle_seconds=usual.idle_seconds if limits.idle_seconds is None else limits.idle_seconds,
            silence_seconds=usual.silence_seconds if limits.silence_seconds is None else limits.silence_seconds,
        )  # fmt: skip

    def _status(self, call: Call) -> Iterator[bytes]:
        alarm = Alarm(call.context.cancel)
        try:
            with alarm.within(STATUS_SECONDS):
                padding = call.request(pb.StatusRequest).ByteSize()
                over = self.budgets.of(call.tenant).over_bytes()
                if over is not None and padding:  # Without it, the answer is what tells the tenant of its limit.
                    call.context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{over.field}: {over.used}, {over.limit}; {over.do}")
                self._audit.note("status", call.tenant, call.peer, {})
                # Whoever shows a certificate sees its own sessions only.
                yield self.status(call.tenant or None).SerializeToString()
        except AtollError as problem:
            call.context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem.page())
        finally:
            alarm.close()


def _check_free(listen: str) -> None:
    """Whether a host can listen there: gRPC tells it twice, once in words of its own that nobody can stop.

    Raises: TransportError.
    """
    name, _, port = listen.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        return
    try:
        family, *_, address = socket.getaddrinfo(name.strip("[]") or "::", int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # As gRPC: those that ended a moment ago are no obstacle.
            tried.bind(address)
            tried.listen()
    except OSError as problem:
        if problem.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
            raise _no_listening(listen, (problem.strerror or str(problem)).lower()) from None


def _no_listening(listen: str, got: str) -> TransportError:
    return TransportError(
        "the host cannot listen there", where=listen, got=got, expected="a free HOST:PORT of this machine",
        do="choose another port, or 0 for any free one",
    )  # fmt: skip


def _told(figures: SessionFigures, code: str) -> dict[str, object]:
    """What the logs say of a session that ended."""
    told: dict[str, object] = {
        "session": figures.session, "seconds": round(time.monotonic() - figures.started_seconds, 3), "tokens": figures.num_tokens,
        "positions": figures.num_positions, "exchanges": figures.num_exchanges, "compute_seconds": round(figures.compute_seconds, 3),
        "wait_seconds": round(figures.wait_seconds, 3), "sent_bytes": figures.sent_bytes, "received_bytes": figures.received_bytes,
    }  # fmt: skip
    if figures.cut is not None:
        told |= {"front": figures.cut.front, "back": figures.cut.back}
    if code == "idle":
        return told | {"code": code, "field": "", "why": "silent, or slow within an exchange, for longer than a session may be"}
    return told if figures.refusal is None else told | reason_of(figures.refusal)


def _tenant_status(tenant: str, use: Use, num_sessions: int) -> pb.TenantStatus:
    limits, bound = use.limits, use.limits.bytes
    return pb.TenantStatus(
        tenant=tenant, sessions=num_sessions, max_sessions=limits.sessions or 0, max_tokens_per_second=limits.tokens_per_second or 0.0,
        burst_tokens=limits.burst_tokens, tokens_left=use.tokens_left, held_seconds=use.held_seconds,
        max_bytes=0 if bound is None else bound.num_bytes, period_seconds=0.0 if bound is None else bound.period_seconds,
        bytes=use.num_bytes, free_seconds=use.free_seconds, again_seconds=use.again_seconds,
    )  # fmt: skip


def _session_status(figures: SessionFigures, now: float) -> pb.SessionStatus:
    return pb.SessionStatus(
        session=figures.session, tenant=figures.tenant, seconds=now - figures.started_seconds, tokens=figures.num_tokens,
        exchanges=figures.num_exchanges, sent_bytes=figures.sent_bytes, received_bytes=figures.received_bytes,
        positions=figures.num_positions, compute_seconds=figures.compute_seconds, cache_bytes=figures.cache_bytes,
    )  # fmt: skip
