"""A host: a gRPC server that gives every device a session on one shared base."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from atoll.cost.meters import resident_bytes
from atoll.errors import TransportError
from atoll.split.conversation import Conversation
from atoll.split.cut import Cut
from atoll.split.host.metrics import HostAccount, NoRoom
from atoll.split.host.parts import Parts
from atoll.split.host.session import HostSession, Served, SessionFigures
from atoll.split.transport import OPTIONS, SERVICE, ServerTransport
from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import Dialogue
from atoll.wire.frames import Message, Packer

STOP_SECONDS = 2.0
HELLO_SECONDS = 10.0
ONE_AT_A_PORT = ("grpc.so_reuseport", 0)
"""Else two hosts could listen on one port, and a device would meet now the one, now the other."""
log = logging.getLogger(__name__)


class Host:
    """Serves until `stop`. `credentials` None: without TLS. `max_tenant_sessions` None: a tenant may have all sessions."""

    def __init__(
        self, served: Served, max_sessions: int, listen: str, credentials: grpc.ServerCredentials | None,
        max_tenant_sessions: int | None = None,
    ) -> None:  # fmt: skip
        self._served, self._max_sessions = served, max_sessions
        self.account, self._started = HostAccount(max_sessions, max_tenant_sessions), time.monotonic()
        self._threads: set[threading.Thread] = set()
        self._at_stop: list[Callable[[], None]] = []
        # A few more threads than sessions, so that a device beyond the limit is told so, and status is answered, while all are busy.
        workers = max_sessions + 8
        self._server = grpc.server(
            ThreadPoolExecutor(workers, thread_name_prefix="atoll-grpc"), options=(*OPTIONS, ONE_AT_A_PORT), maximum_concurrent_rpcs=workers
        )
        handlers = {
            "Part": grpc.unary_stream_rpc_method_handler(Parts(served.source).serve, request_deserializer=pb.PartRequest.FromString),
            "Train": grpc.stream_stream_rpc_method_handler(self._train),
            "Status": grpc.unary_unary_rpc_method_handler(
                self._status, request_deserializer=pb.StatusRequest.FromString, response_serializer=pb.StatusReply.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            self.port = self._server.add_insecure_port(listen) if credentials is None else self._server.add_secure_port(listen, credentials)
        except RuntimeError as problem:
            raise TransportError(
                "the host cannot listen there", where=listen, got=str(problem).splitlines()[0], expected="a free HOST:PORT of this machine",
                do="choose another port, or 0 for any free one",
            ) from None  # fmt: skip

    def start(self) -> None:
        """Begin to serve; returns at once."""
        self._server.start()

    def stop(self) -> None:
        """End all sessions; their devices find the host gone and wait for it."""
        self._server.stop(STOP_SECONDS).wait()
        for thread in tuple(self._threads):
            thread.join(STOP_SECONDS)
        for action in self._at_stop:
            action()
        self._at_stop.clear()

    def at_stop(self, action: Callable[[], None]) -> None:
        """Do this when the host stops."""
        self._at_stop.append(action)

    def status(self, tenant: str | None = None) -> pb.StatusReply:
        """What the host serves and how busy it is; with a tenant, the list of sessions is only of that tenant's."""
        facts, totals, now = self._served.facts(Cut(0, 0)), self.account.totals(), time.monotonic()
        return pb.StatusReply(
            protocol=facts.protocol, atoll_version=facts.atoll_version, base_digest=facts.base_digest,
            tokenizer_digest=facts.tokenizer_digest, num_blocks=facts.num_blocks, bits=self._served.bits, precision=facts.precision,
            codecs=facts.codecs, wire_modes=facts.wire_modes, adapter_kinds=facts.kinds, max_tokens=facts.max_tokens,
            max_rank=facts.max_rank, sessions=totals.sessions, max_sessions=self._max_sessions,
            uptime_seconds=now - self._started, tokens=totals.tokens, tokens_per_second=self.account.tokens_per_second(),
            resident_bytes=resident_bytes(), open=[_session_status(figures, now) for figures in self.account.sessions(tenant)],
        )  # fmt: skip

    def _train(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        # Until it has said who it is, a device has less time.
        transport = ServerTransport(requests, context.cancel, min(HELLO_SECONDS, self._served.idle_seconds))
        if not context.add_callback(transport.close):
            transport.close()  # The device is gone already, and nobody else would end the transport's thread.
        conversation = Conversation(Dialogue("host"), transport, "fp32")
        figures = self.account.open(tenant_of(context))
        if isinstance(figures, NoRoom):
            yield from Packer().frames(Message(pb.Refusal(
                code="busy", field=figures.field, host_value=f"at most {figures.limit}", device_value="one more", do=figures.do
            )))  # fmt: skip
            return
        name = f"atoll-session-{figures.session}"
        thread = threading.Thread(target=self._run, args=(conversation, transport, figures), name=name, daemon=True)
        self._threads.add(thread)
        thread.start()
        yield from transport.outbox

    def _run(self, conversation: Conversation, transport: ServerTransport, figures: SessionFigures) -> None:
        log.info("session %s opened by %s", figures.session, figures.tenant or "a device without a certificate")
        try:
            HostSession(self._served, conversation, figures).run()
        finally:
            self.account.end(figures, "idle" if transport.silent else figures.refusal)
            self._threads.discard(threading.current_thread())
            log.info("session %s ended after %d tokens", figures.session, figures.num_tokens)

    def _status(self, request: Any, context: Any) -> Any:
        # Whoever shows a certificate sees its own sessions only, though it may have no name.
        return self.status(tenant_of(context) if context.peer_identities() else None)


def _session_status(figures: SessionFigures, now: float) -> pb.SessionStatus:
    return pb.SessionStatus(
        session=figures.session, tenant=figures.tenant, seconds=now - figures.started_seconds, tokens=figures.num_tokens,
        exchanges=figures.num_exchanges, sent_bytes=figures.sent_bytes, received_bytes=figures.received_bytes,
    )  # fmt: skip


def tenant_of(context: Any) -> str:
    """The name in the device's certificate; empty where it has none."""
    auth: Mapping[str, Any] = context.auth_context()
    names = auth.get("x509_common_name") or ()
    return str(next(iter(names), b"").decode("utf-8", "replace")) if names else ""
