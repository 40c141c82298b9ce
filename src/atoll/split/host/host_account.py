"""What the sessions of a host have done, counted for each tenant, and whether there is room for another one."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from atoll.split.host.limits.budgets import Over
from atoll.split.host.session import SessionFigures
from atoll.split.host.tenants import HostLimits
from atoll.units import format_wait

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
    """Figures since the start of the host, of all tenants or of one."""

    sessions: int
    """Open now."""
    tokens: int
    positions: int
    """Tokens and padding."""
    exchanges: int
    compute_seconds: float
    wait_seconds: float
    """For turns to compute."""
    sent_bytes: int
    received_bytes: int
    refused: Counter[str]
    """Sessions that the host refused or ended, by code."""
    cache_bytes: int = 0
    """Of keys and values that are kept now."""


class HostAccount:
    """The sessions of a host: those that are open, and the sums over those that ended."""

    def __init__(self, limits: HostLimits) -> None:
        self._limits, self._rate = limits, TokenRate()
        self._open: dict[str, SessionFigures] = {}
        self._past: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._refused: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._numbers, self._room = itertools.count(1), threading.Condition()

    def refused(self, tenant: str, code: str) -> None:
        """A session did not come to be."""
        with self._room:
            self._refused[tenant][code] += 1

    def open(self, tenant: str) -> SessionFigures | Over:
        """The figures of a new session; what is in its way, and one refusal more, where there is no room for it."""
        with self._room:
            self._room.wait_for(lambda: self._no_room(tenant) is None, ROOM_SECONDS)
            no_room = self._no_room(tenant)
            if no_room is not None:
                self._refused[tenant]["busy"] += 1
                return no_room
            figures = SessionFigures(f"{next(self._numbers)}-{secrets.token_hex(4)}", tenant, on_tokens=self._rate.add)
            self._open[figures.session] = figures
            return figures

    def end(self, figures: SessionFigures, code: str) -> None:
        """A session has ended; by the host where there is a code."""
        with self._room:
            del self._open[figures.session]
            self._past[figures.tenant] += _sums(figures)
            if code:
                self._refused[figures.tenant][code] += 1
            self._room.notify_all()  # Not everybody who waits has room now: a tenant may still be at its own limit.

    def _no_room(self, tenant: str) -> Over | None:
        of_tenant, most = sum(figures.tenant == tenant for figures in self._open.values()), self._limits.of(tenant).sessions
        if most is not None and of_tenant >= most:
            do = f"come again when another of this tenant has ended ({self._ends(tenant)}); who runs the host may allow more"
            return Over("tenant_sessions", f"at most {most}", "one more", do)
        if len(self._open) >= self._limits.max_sessions:
            do = f"come again when another has ended ({self._ends(None)}); who runs the host may allow more"
            return Over("sessions", f"at most {self._limits.max_sessions}", "one more", do)
        return None

    def _ends(self, tenant: str | None) -> str:
        own = None if tenant is None else self._limits.of(tenant).idle_seconds
        return f"a silent one does after {format_wait(self._limits.idle_seconds if own is None else own)}"

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
            return self._totals(set(self._tenants()))

    def totals_by_tenant(self) -> Mapping[str, Totals]:
        """The same for each tenant that has been here."""
        with self._room:
            return {tenant: self._totals({tenant}) for tenant in sorted(set(self._tenants()))}

    def _tenants(self) -> list[str]:
        return [*self._past, *self._refused, *(figures.tenant for figures in self._open.values())]

    def _totals(self, tenants: set[str]) -> Totals:
        now = [figures for figures in self._open.values() if figures.tenant in tenants]
        sums: Counter[str] = sum((self._past[tenant] for tenant in tenants if tenant in self._past), start=Counter[str]())
        for figures in now:
            sums += _sums(figures)
        refused = sum((self._refused[tenant] for tenant in tenants if tenant in self._refused), start=Counter[str]())
        return Totals(
            len(now), sums["tokens"], sums["positions"], sums["exchanges"], sums["compute_seconds"], sums["wait_seconds"],
            sums["sent_bytes"], sums["received_bytes"], refused, sum(figures.cache_bytes for figures in now),
        )  # fmt: skip


def _sums(figures: SessionFigures) -> Counter[str]:
    sums: Any = {
        "tokens": figures.num_tokens, "positions": figures.num_positions, "exchanges": figures.num_exchanges,
        "compute_seconds": figures.compute_seconds, "wait_seconds": figures.wait_seconds, "sent_bytes": figures.sent_bytes,
        "received_bytes": figures.received_bytes,
    }  # fmt: skip
    return Counter(sums)
