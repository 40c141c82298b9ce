"""Whose turn it is to compute: the tenant that has had the least, whether it waits or is about to come back. No threads, no clock.

The rule is start-time fair queueing, and "anticipation" of the next request as disk schedulers know it: a tenant whose device answers
within milliseconds would else find a long turn of somebody else before each of its many short ones.

Source: https://doi.org/10.1109/90.649569 and https://doi.org/10.1145/502034.502046
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

_MEMORY = 0.9
"""What is left of a long absence in the estimate of the next one."""


@dataclass(slots=True, eq=False)
class _Share:
    """What one tenant has had, and how it behaves. Times are in seconds."""

    used: float = 0.0
    """Compute, moved forward over times in which it asked for none: nobody saves up turns."""
    num_waiting: int = 0
    num_sessions: int = 0
    since: float = 0.0
    """Since when it computes, or is away."""
    away: bool = False
    within: bool = False
    """Whether it left in the middle of an exchange, and so will be back when its device has answered."""
    absences: dict[bool, float] = field(default_factory=dict)
    """How long it usually stays away, by `within`."""

    def is_expected(self, now: float, lead: float) -> bool:
        """Whether it will be back so soon that somebody who is ahead of it by `lead` waits for it."""
        usual = self.absences.get(self.within)
        return self.away and usual is not None and usual < lead and now - self.since < 2 * usual


class FairShare:
    """Shares of one processor: it belongs to one tenant at a time, until that tenant ends its turn."""

    def __init__(self) -> None:
        self._shares: dict[str, _Share] = {}
        self._level = 0.0
        """What the tenant whose turn began last had had by then."""
        self._kept: tuple[_Share, float] | None = None
        """For whom the processor is idle though others wait, and since when."""

    @property
    def num_tenants(self) -> int:
        """Those that have sessions."""
        return sum(share.num_sessions > 0 for share in self._shares.values())

    def enter(self, tenant: str) -> None:
        """A session of the tenant opens."""
        self._shares.setdefault(tenant, _Share()).num_sessions += 1

    def leave(self, tenant: str) -> None:
        """A session of the tenant ends."""
        share = self._shares[tenant]
        share.num_sessions -= 1
        share.away = share.away and share.num_sessions > 0

    def arrive(self, tenant: str, now: float) -> None:
        """One more session of the tenant waits for its turn."""
        share = self._shares[tenant]
        if share.away:
            share.absences[share.within] = max(now - share.since, _MEMORY * share.absences.get(share.within, 0.0))
        if share.num_waiting == 0:
            share.used = max(share.used, self._level)
        share.away = False
        share.num_waiting += 1

    def choose(self, now: float) -> tuple[str | None, float | None]:
        """Who of those that wait, of whom there is one, may go; where it is better to wait for one who is away: for how long at most."""
        self._charge_idle(now)
        used, tenant = min((share.used, tenant) for tenant, share in self._shares.items() if share.num_waiting)
        expected = list(self._expected(used, now))
        if not expected:
            return tenant, None
        first = min(expected, key=lambda share: share.used)
        self._kept = (first, now)
        return None, max(min(first.since + 2 * first.absences[first.within] - now, used - first.used), 1e-3)

    def begin(self, tenant: str, now: float) -> None:
        """The turn of one that waits begins."""
        self._charge_idle(now)
        share = self._shares[tenant]
        share.num_waiting -= 1
        share.since, self._level = now, share.used

    def end(self, tenant: str, now: float, *, within: bool) -> float:
        """Its turn ends, in the middle of an exchange or at its end; the seconds that it took."""
        share = self._shares[tenant]
        seconds = now - share.since
        share.used += seconds
        share.since, share.within, share.away = now, within, share.num_waiting == 0
        return seconds

    def _expected(self, used: float, now: float) -> Iterator[_Share]:
        for share in self._shares.values():
            if share.used < used and share.is_expected(now, used - share.used):
                yield share

    def _charge_idle(self, now: float) -> None:
        """A processor that was kept for somebody was that tenant's."""
        if self._kept is not None:
            share, since = self._kept
            share.used += now - since
            self._kept = None
