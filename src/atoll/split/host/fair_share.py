"""Whose turn it is to compute: the tenant that has had the least, whether it waits or is about to come back. No threads, no clock.

The rule is start-time fair queueing, and "anticipation" of the next request as disk schedulers know it: a tenant whose device answers
within milliseconds would else find a long turn of somebody else before each of its many short ones.

Source: https://doi.org/10.1109/90.649569 and https://doi.org/10.1145/502034.502046
"""

from __future__ import annotations

from dataclasses import dataclass, field

CREDIT_SECONDS = 1.0
"""So much compute a tenant that asks seldom gets before those that ask all the time."""
_MEMORY = 0.9
"""What is left of a long turn in the estimate of the next one, and how much of the estimate of absences is of those before the last."""


@dataclass(slots=True, eq=False)
class _Share:
    """What one tenant has had, and how it behaves. Times are in seconds."""

    used: float = 0.0
    """Compute, moved forward over times in which it asked for none: nobody saves up more than the credit."""
    turn: float = 0.0
    """How long its turns usually are at most."""
    num_waiting: int = 0
    num_sessions: int = 0
    since: float = 0.0
    """Since when it computes, or is away."""
    away: bool = False
    within: bool = False
    """Whether it left in the middle of an exchange, and so will be back when its device has answered."""
    absences: dict[bool, float] = field(default_factory=dict)
    """How long it usually stays away, by `within`."""

    def is_expected(self, now: float, other: _Share) -> bool:
        """Whether it will be back so soon that another waits for it: one that has had more, and whose turn would be longer than that."""
        worth = self.worth(other)
        return self.away and self.absences.get(self.within, worth) < worth and now - self.since < worth

    def worth(self, other: _Share) -> float:
        """How long it is at most better that another waits for it."""
        return min(other.used - self.used, other.turn)


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
            absence = now - share.since
            share.absences[share.within] = _MEMORY * share.absences.get(share.within, absence) + (1 - _MEMORY) * absence
        if share.num_waiting == 0:
            share.used = max(share.used, self._level - CREDIT_SECONDS)
        share.away = False
        share.num_waiting += 1

    def choose(self, now: float) -> tuple[str | None, float | None]:
        """Who of those that wait, of whom there is one, may go; where it is better to wait for one who is away: for how long at most."""
        self._charge_idle(now)
        _, tenant = min((share.used, tenant) for tenant, share in self._shares.items() if share.num_waiting)
        expected = [share for share in self._shares.values() if share.is_expected(now, self._shares[tenant])]
        if not expected:
            return tenant, None
        first = min(expected, key=lambda share: share.used)
        self._kept = (first, now)
        return None, max(first.since + first.worth(self._shares[tenant]) - now, 1e-3)

    def begin(self, tenant: str, now: float) -> None:
        """The turn of one that waits begins."""
        self._charge_idle(now)
        share = self._shares[tenant]
        share.num_waiting -= 1
        share.since, self._level = now, max(self._level, share.used)

    def end(self, tenant: str, now: float, *, within: bool) -> float:
        """Its turn ends, in the middle of an exchange or at its end; the seconds that it took."""
        share = self._shares[tenant]
        seconds = now - share.since
        share.used += seconds
        share.turn = max(seconds, _MEMORY * share.turn)
        share.since, share.within, share.away = now, within, share.num_waiting == 0
        return seconds

    def running(self, tenant: str, now: float) -> float:
        """How long the tenant's turn takes by now."""
        return now - self._shares[tenant].since

    def move(self, source: str, target: str, seconds: float) -> None:
        """So much compute of one tenant was another's."""
        self._shares[source].used -= seconds
        self._shares[target].used += seconds

    def _charge_idle(self, now: float) -> None:
        """A processor that was kept for somebody was that tenant's."""
        if self._kept is not None:
            share, since = self._kept
            share.used += now - since
            self._kept = None
