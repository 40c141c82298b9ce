"""A host's figures as a page for Prometheus."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Protocol

import prometheus_client
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from atoll.cost.meters import resident_bytes
from atoll.errors import TransportError
from atoll.split.host.host_account import HostAccount, Totals
from atoll.split.host.limits.budgets import Budgets, Use

READER_SECONDS, READERS = 5.0, 16
"""How long a reader may take for its question and the answer, and how many there may be at a time. All of them share one thread."""
_LARGEST_QUESTION_BYTES = 2**13
_HEAD = "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"


class Watched(Protocol):
    """A host, as the page sees it."""

    @property
    def account(self) -> HostAccount:
        """What it has done."""

    @property
    def budgets(self) -> Budgets:
        """What tenants have used of what they may."""

    def at_stop(self, action: Callable[[], None]) -> None:
        """Do this when the host stops."""


def serve_metrics(host: Watched, address: str, *, tenants: bool = False) -> str:
    """Serve the page at HOST:PORT until the host stops; loopback where HOST is left away, any free port where PORT is 0.

    Names of `tenants` are told only where that is asked for: whoever can read the page would learn who the customers are.

    Returns where it is.
    Raises: TransportError.
    """
    name, _, port = address.rpartition(":")
    name = name.strip("[]") or "127.0.0.1"
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Figures(host.account, host.budgets, tenants))
    page = _Page(lambda: prometheus_client.generate_latest(registry))
    loop = asyncio.new_event_loop()
    try:
        server = loop.run_until_complete(asyncio.start_server(page.answer, name, int(port), limit=_LARGEST_QUESTION_BYTES))
    except (OSError, ValueError, OverflowError) as problem:
        loop.close()
        raise TransportError(
            "the metrics cannot be served there", where=address, got=str(problem), expected="a free HOST:PORT of this machine",
            do="choose another port, or 0 for any free one",
        ) from None  # fmt: skip
    thread = threading.Thread(target=_run, args=(loop, server), name="atoll-metrics", daemon=True)
    thread.start()

    def end() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    host.at_stop(end)
    bound = server.sockets[0].getsockname()[1]
    return f"[{name}]:{bound}" if ":" in name else f"{name}:{bound}"


def _run(loop: asyncio.AbstractEventLoop, server: asyncio.Server) -> None:
    """Until the loop is stopped; then nothing of it is left."""
    loop.run_forever()
    server.close()
    loop.run_until_complete(_end_readers())
    loop.close()


async def _end_readers() -> None:
    readers = asyncio.all_tasks() - {asyncio.current_task()}
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)


class _Page:
    """One page, whatever its path: HTTP/1.1 as far as a scraper needs it."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make, self._readers = make, 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one question, answer it, and close."""
        self._readers += 1
        try:
            with suppress(TimeoutError, OSError, EOFError, asyncio.LimitOverrunError):
                async with asyncio.timeout(READER_SECONDS):
                    if self._readers <= READERS:
                        await self._serve(reader, writer)
        finally:
            self._readers -= 1
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = await reader.readuntil(b"\r\n\r\n")
        is_asked = question.startswith((b"GET ", b"HEAD "))
        body = self._make() if is_asked else b"GET only\n"
        kind = prometheus_client.CONTENT_TYPE_LATEST if is_asked else "text/plain"
        head = _HEAD.format(status="200 OK" if is_asked else "405 Method Not Allowed", kind=kind, length=len(body))
        writer.write(head.encode() + (b"" if question.startswith(b"HEAD ") else body))
        writer.write_eof()
        await writer.drain()
        while await reader.read(_LARGEST_QUESTION_BYTES):
            pass  # Until the other side has it all and closes.


class _Figures(Collector):
    """Reads the account when the page is asked for, so that nothing is counted twice."""

    def __init__(self, account: HostAccount, budgets: Budgets, tenants: bool) -> None:
        self._account, self._budgets, self._tenants = account, budgets, tenants

    def collect(self) -> Iterator[Metric]:
        """The figures of now."""
        yield GaugeMetricFamily("atoll_host_resident_bytes", "Memory that the host's process holds.", resident_bytes())
        yield from _families("atoll_host", "", {(): self._account.totals()}, ())
        if self._tenants:
            rows: dict[tuple[str, ...], Totals] = {(name,): totals for name, totals in self._account.totals_by_tenant().items()}
            yield from _families("atoll_host_tenant", ", by tenant", rows, ("tenant",))
            yield from _limits(self._budgets.uses(None))


def _limits(uses: Mapping[str, Use]) -> Iterator[Metric]:
    held = CounterMetricFamily(
        "atoll_host_tenant_held_seconds", "Time for which exchanges were held back, being beyond the tenant's tokens a second.",
        labels=("tenant",),
    )  # fmt: skip
    used = GaugeMetricFamily("atoll_host_tenant_period_bytes", "Bytes of the tenant's hour or day so far.", labels=("tenant",))
    most = GaugeMetricFamily("atoll_host_tenant_period_bytes_limit", "Bytes that it may move in that time.", labels=("tenant",))
    for tenant, use in uses.items():
        held.add_metric((tenant,), use.held_seconds)
        if use.limits.bytes is not None:
            used.add_metric((tenant,), use.num_bytes)
            most.add_metric((tenant,), use.limits.bytes.num_bytes)
    yield from (held, used, most)


def _families(prefix: str, note: str, rows: Mapping[tuple[str, ...], Totals], labels: tuple[str, ...]) -> Iterator[Metric]:
    sessions = GaugeMetricFamily(f"{prefix}_sessions", f"Sessions that are open{note}.", labels=labels)
    tokens = CounterMetricFamily(f"{prefix}_tokens", f"Real tokens of all exchanges{note}.", labels=labels)
    positions = CounterMetricFamily(f"{prefix}_positions", f"Tokens and padding of all exchanges{note}.", labels=labels)
    exchanges = CounterMetricFamily(f"{prefix}_exchanges", f"Exchanges that were finished{note}.", labels=labels)
    compute = CounterMetricFamily(f"{prefix}_compute_seconds", f"Time that the base was used for{note}.", labels=labels)
    wait = CounterMetricFamily(f"{prefix}_wait_seconds", f"Time that sessions waited for the base{note}.", labels=labels)
    moved = CounterMetricFamily(f"{prefix}_bytes", f"Bytes of frames, as seen from the host{note}.", labels=(*labels, "direction"))
    refused = CounterMetricFamily(f"{prefix}_refused", f"Sessions that the host refused or ended, by code{note}.", labels=(*labels, "code"))
    kept = GaugeMetricFamily(f"{prefix}_cache_bytes", f"Keys and values that generations go on from{note}.", labels=labels)
    for row, totals in rows.items():
        sessions.add_metric(row, totals.sessions)
        kept.add_metric(row, totals.cache_bytes)
        tokens.add_metric(row, totals.tokens)
        positions.add_metric(row, totals.positions)
        exchanges.add_metric(row, totals.exchanges)
        compute.add_metric(row, totals.compute_seconds)
        wait.add_metric(row, totals.wait_seconds)
        moved.add_metric((*row, "sent"), totals.sent_bytes)
        moved.add_metric((*row, "received"), totals.received_bytes)
        for code, count in sorted(totals.refused.items()):
            refused.add_metric((*row, code), count)
    yield from (sessions, tokens, positions, exchanges, compute, wait, moved, refused, kept)
