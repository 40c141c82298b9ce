"""Who may call a host, and how much at a time: asked before a call keeps a thread, and whenever it is answered."""

from __future__ import annotations

import datetime
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID
from google.protobuf.message import DecodeError, Message

from atoll.errors import ProtocolError
from atoll.split.authority.revocation import Revoked
from atoll.split.cut import Cut
from atoll.split.host.audit import Audit
from atoll.split.host.limits.budgets import Budgets
from atoll.split.host.limits.rules import ByteLimit, TenantLimits
from atoll.split.transport import lost

Asked = TypeVar("Asked", bound=Message)

SPARE = 4
"""Threads of a method beyond the calls that it takes, for telling others that they are too many."""
NAME_CHARACTERS = 64
_NAMELESS = f"the certificate names nobody: it needs one common name of 1 to {NAME_CHARACTERS} visible characters"


@dataclass(frozen=True, slots=True)
class HostLimits:
    """What a host bears."""

    max_sessions: int = 16
    max_tokens: int = 16_384
    """Padded tokens of one micro-batch."""
    idle_seconds: float = 600.0
    merges: bool = False
    """Whether devices may have killed modules merged: a copy of a weight for each of them, in every session."""
    max_tenant_sessions: int | None = None
    """Of devices whose certificates have the same name; without certificates all are one tenant. None: as many as of all together."""
    exchange_seconds: float = 3600.0
    recomputes: bool = False
    """Whether a session with lent adapters keeps no activations while its device computes, and makes the forward pass twice."""
    batches: bool = False
    """Whether lent micro-batches that wait go through the base together; with `recomputes`."""
    max_part: Cut | None = None
    """Blocks that a tenant may fetch, over all its calls. None: what one cut needs, of at most half of the blocks."""
    tenant_tokens_per_second: float | None = None
    """Positions, padding included, of a tenant's exchanges; None: as many as come."""
    tenant_bytes: ByteLimit | None = None
    silence_seconds: float = 14_400.0
    """How long a session may wait between its exchanges, all told."""
    cache_bytes: int = 10**9
    """Of keys and values that generations go on from, for all sessions together; 0: none are kept."""
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)
    """Of those that have limits of their own, which hold in place of all of the above."""

    def of(self, tenant: str) -> TenantLimits:
        """What one tenant may have."""
        return self.tenants.get(tenant, self.usual)

    @property
    def usual(self) -> TenantLimits:
        """What a tenant may have that has no limits of its own."""
        return TenantLimits(self.max_tenant_sessions, self.tenant_tokens_per_second, None, self.tenant_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a method by somebody who was let in."""

    tenant: str
    """The name in the caller's certificate; empty where none is asked for."""
    peer: str
    """Its address, as gRPC writes it."""
    requests: Iterator[bytes]
    context: Any

    def request(self, kind: type[Asked]) -> Asked:
        """The request of a method that takes one; an alarm of whoever waits for it bounds how long.

        Raises: ProtocolError, HostLostError.
        """
        data = next(self.requests, None)
        if data is None:
            raise lost("the call ended before its request")
        try:
            return kind.FromString(data)
        except DecodeError as problem:
            raise ProtocolError("a request that cannot be read", got=str(problem), expected=kind.__name__) from None


@dataclass(frozen=True, slots=True)
class Shown:
    """What a caller's certificate says."""

    name: str | None
    """Empty without a certificate, None where it has no usable one."""
    serial: int = 0
    since: datetime.datetime | None = None
    """From when it holds."""

    @classmethod
    def by(cls, auth: Mapping[str, Any]) -> Shown:
        """By gRPC's authentication context.

        Not gRPC's own word for the name, which ends at a NUL: a certificate for "north\\0 & sons" would be one for "north".
        """
        pem = next(iter(auth.get("x509_pem_cert") or ()), None)
        return cls("") if pem is None else _shown(bytes(pem))


@lru_cache(1024)
def _shown(pem: bytes) -> Shown:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        return Shown(None)
    name = names[0].value if len(names) == 1 else b""
    known = name if isinstance(name, str) and is_tenant_name(name) else None
    return Shown(known, certificate.serial_number, certificate.not_valid_before_utc)


def is_tenant_name(name: str) -> bool:
    """Whether a certificate can name a tenant so."""
    return name.isprintable() and name.strip() == name and 1 <= len(name) <= NAME_CHARACTERS


class Door:
    """One method of the service. It has threads of its own, so that no other method can take them all."""

    def __init__(
        self, name: str, answer: Callable[[Call], Iterator[bytes]], most: int, most_of_tenant: Callable[[str], int], budgets: Budgets,
        audit: Audit, revoked: Revoked | None,
    ) -> None:  # fmt: skip
        self.name, self._answer, self._most, self._most_of_tenant, self._audit = name, answer, most, most_of_tenant, audit
        self._budgets, self._revoked = budgets, revoked
        self._calls, self._lock = Counter[str](), threading.Lock()
        self._threads = ThreadPoolExecutor(most + SPARE, thread_name_prefix=f"atoll-grpc-{name.lower()}")

    def handler(self) -> grpc.RpcMethodHandler:
        """For gRPC. A stream of requests even where there is one: gRPC would wait for it in a thread, without end and before it asks us."""
        behavior: Any = partial(self._enter)
        behavior.experimental_thread_pool = self._threads
        return grpc.stream_stream_rpc_method_handler(behavior)

    def close(self) -> None:
        """Take no more calls."""
        self._threads.shutdown(wait=False)

    def _enter(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        shown = Shown.by(context.auth_context())
        tenant = shown.name
        if tenant is None:
            self._refuse(context, "", grpc.StatusCode.UNAUTHENTICATED, _NAMELESS)
        elif why := self._distrust(shown):
            self._refuse(context, tenant, grpc.StatusCode.UNAUTHENTICATED, why)
        elif not self._count_in(tenant):
            self._refuse(context, tenant, grpc.StatusCode.RESOURCE_EXHAUSTED, f"too many calls of {self.name} at a time")
        else:
            account = self._budgets.of(tenant)

            def counted(request: bytes) -> bytes:
                account.add_bytes(len(request))
                return request

            try:
                for answer in self._answer(Call(tenant, context.peer(), map(counted, requests), context)):
                    if why := self._distrust(shown):
                        self._refuse(context, tenant, grpc.StatusCode.UNAUTHENTICATED, why)
                    account.add_bytes(len(answer))
                    yield answer
            finally:
                with self._lock:
                    self._calls[tenant] -= 1

    def _distrust(self, shown: Shown) -> str | None:
        return None if self._revoked is None else self._revoked.refusal(shown.name or "", shown.serial, shown.since)

    def _refuse(self, context: Any, tenant: str, code: grpc.StatusCode, why: str) -> None:
        """End the call by a status, for which no thread waits until the caller has read it."""
        self._audit.note("call refused", tenant, context.peer(), {"method": self.name, "why": why})
        context.abort(code, why)

    def _count_in(self, tenant: str) -> bool:
        with self._lock:
            # Those without certificates cannot be told apart, and share what there is.
            fits = self._calls.total() < self._most and (not tenant or self._calls[tenant] < self._most_of_tenant(tenant))
            self._calls[tenant] += fits
            return fits
