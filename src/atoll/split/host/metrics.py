"""What a host has done, counted: for its status, and as a page for Prometheus."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import prometheus_client
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from atoll.cost.meters import resident_bytes
from atoll.errors import TransportError
from atoll.split.host.session import SessionFigures

RATE_SECONDS = 60
ROOM_SECONDS = 1.0
"""A device that ends a session to open another may be quicker than the end of the first: a full host waits so long for room."""


class TokenRate:
    """Tokens per second over the last minute, or since the start of a younger host."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._start, self._lock = clock, clock(), threading.Lock()
        self._seconds: deque[tuple[int, int]] = deque(maxlen=RATE_SECONDS)  # (second since the start, its tokens)

    def add(self, num_tokens: int) -> None:
        """Count tokens as of now."""
        with self._lock:
            second = int(self._clock() - self._start)
            if self._seconds and self._seconds[-1][0] == second:
                num_tokens += self._seconds.pop()[1]
            self._seconds.append((second, num_tokens))

    def per_second(self) -> float:
        """The rate; a host's first second counts as a whole one."""
        with self._lock:
            age = self._clock() - self._start
            tokens = sum(num_tokens for second, num_tokens in self._seconds if second > age - RATE_SECONDS)
        return tokens / min(RATE_SECONDS, max(age, 1.0))


@dataclass(frozen=True, slots=True)
class Totals:
    """Figures of a host since its start, over all tenants."""

    sessions: int
    """Open now."""
    tokens: int
    exchanges: int
    sent_bytes: int
    received_bytes: int
    refused: Counter[str]
    """Sessions that the host refused or ended, by code."""


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Why a session cannot open now: the limit that is reached, as a Refusal tells it."""

    field: str
    limit: int
    do: str


class HostAccount:
    """The sessions of a host: those that are open, and the sums over those that ended."""

    def __init__(self, max_sessions: int, max_tenant_sessions: int | None = None) -> None:
        self._max_sessions, self._max_tenant_sessions, self._rate = max_sessions, max_tenant_sessions, TokenRate()
        self._open: dict[str, SessionFigures] = {}
        self._past, self._refused = Counter[str](), Counter[str]()
        self._numbers, self._room = itertools.count(1), threading.Condition()

    def open(self, tenant: str) -> SessionFigures | NoRoom:
        """The figures of a new session; what is in its way, and one refusal more, where there is no room for it."""
        with self._room:
            self._room.wait_for(lambda: self._no_room(tenant) is None, ROOM_SECONDS)
            no_room = self._no_room(tenant)
            if no_room is not None:
                self._refused["busy"] += 1
                return no_room
            figures = SessionFigures(f"{next(self._numbers)}-{secrets.token_hex(4)}", tenant, on_tokens=self._rate.add)
            self._open[figures.session] = figures
            return figures

    def end(self, figures: SessionFigures, code: str) -> None:
        """A session has ended; by the host where there is a code."""
        with self._room:
            del self._open[figures.session]
            self._past += _sums(figures)
            if code:
                self._refused[code] += 1
            self._room.notify_all()  # Not everybody who waits has room now: a tenant may still be at its own limit.

    def _no_room(self, tenant: str) -> NoRoom | None:
        of_tenant = sum(figures.tenant == tenant for figures in self._open.values())
        if self._max_tenant_sessions is not None and of_tenant >= self._max_tenant_sessions:
            do = "end another session with the same certificate, or start the host with a larger --max-tenant-sessions"
            return NoRoom("tenant_sessions", self._max_tenant_sessions, do)
        if len(self._open) >= self._max_sessions:
            return NoRoom("sessions", self._max_sessions, "try again later, or start the host with a larger --max-sessions")
        return None

    def sessions(self, tenant: str | None) -> list[SessionFigures]:
        """Open sessions of a tenant; None: of all."""
        with self._room:
            return [figures for figures in self._open.values() if tenant is None or figures.tenant == tenant]

    def tokens_per_second(self) -> float:
        """Over the last minute."""
        return self._rate.per_second()

    def totals(self) -> Totals:
        """The figures of now."""
        with self._room:
            sums = sum(map(_sums, self._open.values()), start=self._past.copy())
            return Totals(
                len(self._open), sums["tokens"], sums["exchanges"], sums["sent_bytes"], sums["received_bytes"], self._refused.copy()
            )


class Watched(Protocol):
    """A host, as the page sees it."""

    @property
    def account(self) -> HostAccount:
        """What it has done."""

    def at_stop(self, action: Callable[[], None]) -> None:
        """Do this when the host stops."""


def serve_metrics(host: Watched, address: str) -> str:
    """Serve the page at HOST:PORT until the host stops; loopback where HOST is left away, any free port where PORT is 0.

    Returns where it is.
    Raises: TransportError.
    """
    name, _, port = address.rpartition(":")
    name = name.strip("[]") or "127.0.0.1"
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Figures(host.account))
    try:
        server, thread = prometheus_client.start_http_server(int(port), name, registry)
    except (OSError, ValueError, OverflowError) as problem:
        raise TransportError(
            "the metrics cannot be served there", where=address, got=str(problem), expected="a free HOST:PORT of this machine",
            do="choose another port, or 0 for any free one",
        ) from None  # fmt: skip

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    host.at_stop(end)
    return f"[{name}]:{server.server_port}" if ":" in name else f"{name}:{server.server_port}"


class _Figures(Collector):
    """Reads the account when the page is asked for, so that nothing is counted twice."""

    def __init__(self, account: HostAccount) -> None:
        self._account = account

    def collect(self) -> Iterator[Metric]:
        """The figures of now."""
        totals = self._account.totals()
        yield GaugeMetricFamily("atoll_host_sessions", "Sessions that are open.", totals.sessions)
        yield GaugeMetricFamily("atoll_host_resident_bytes", "Memory that the host's process holds.", resident_bytes())
        yield CounterMetricFamily("atoll_host_tokens", "Real tokens of all exchanges.", totals.tokens)
        yield CounterMetricFamily("atoll_host_exchanges", "Exchanges that were finished.", totals.exchanges)
        moved = CounterMetricFamily("atoll_host_bytes", "Bytes of frames, as seen from the host.", labels=["direction"])
        moved.add_metric(["sent"], totals.sent_bytes)
        moved.add_metric(["received"], totals.received_bytes)
        yield moved
        refused = CounterMetricFamily("atoll_host_refused", "Sessions that the host refused or ended, by code.", labels=["code"])
        for code, count in sorted(totals.refused.items()):
            refused.add_metric([code], count)
        yield refused


def _sums(figures: SessionFigures) -> Counter[str]:
    return Counter(
        tokens=figures.num_tokens, exchanges=figures.num_exchanges, sent_bytes=figures.sent_bytes, received_bytes=figures.received_bytes
    )
