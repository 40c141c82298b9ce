"""What tenants have used of what they may use in a time: tokens from a bucket that fills up again, bytes by the hour or by the day.

An account is its tenant's for as long as the host lives, whichever session or connection it comes by; no other tenant's use changes it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from atoll.split.host.limits.rules import ByteLimit, TenantLimits
from atoll.units import counted, format_bytes, format_wait
from atoll.wire import protocol_pb2 as pb

HOLD_SECONDS = 2.0
"""An exchange is held back for so long at a time, after which its device hears that the host lives, and its place is looked at anew."""
AGAIN_SECONDS = 0.05
_TOLERANCE = 1e-6
"""Of a token: what rounding may cost."""


@dataclass(frozen=True, slots=True)
class Over:
    """A limit that is reached."""

    field: str
    """Its name on the wire."""
    limit: str
    used: str
    do: str
    seconds: float = 0.0
    """Until it is worth while to try again; 0 where nobody knows."""

    def refusal(self) -> pb.Refusal:
        """To end a session, or a call before it is one."""
        return pb.Refusal(
            code="busy", field=self.field, host_value=self.limit, device_value=self.used, do=self.do, retry_seconds=self.seconds
        )

    def wait(self) -> pb.Wait:
        """To hold an exchange back."""
        return pb.Wait(field=self.field, host_value=self.limit, device_value=self.used, do=self.do, seconds=self.seconds)


@dataclass(frozen=True, slots=True)
class Use:
    """What a tenant has used by now. Of what is not limited no account is kept: zeros."""

    limits: TenantLimits
    tokens_left: float
    held_seconds: float
    num_bytes: int
    """Of this period, with what was too much before it."""
    free_seconds: float
    """Until none of these count any more."""
    again_seconds: float
    """Until the tenant is below its limit of bytes; 0 where it is."""


class Bucket:
    """Tokens that may be used at a rate, and at once as many as it holds. Whoever asks for more than that waits until it is full."""

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._level, self._at = burst, now

    def level(self, now: float) -> float:
        """What it holds; below 0 after more was taken than it can hold."""
        self._level = min(self._burst, self._level + self._per_second * max(0.0, now - self._at))
        self._at = now
        return self._level

    def wait_seconds(self, line: list[int], now: float) -> float:
        """How long the last of those that take one after the other has to wait."""
        level, seconds = self.level(now), 0.0
        for num_tokens in line:
            missing = min(num_tokens, self._burst) - level
            if missing > _TOLERANCE:
                seconds, level = seconds + missing / self._per_second, level + missing
            level -= num_tokens
        return seconds

    def take(self, num_tokens: int, now: float) -> None:
        """Without asking."""
        self._level = self.level(now) - num_tokens


class Period:
    """Bytes of a period, which begins with the first of them.

    What has begun is not cut off, so that more than the limit may cross; that much less may in the periods after it.
    """

    def __init__(self, limit: ByteLimit) -> None:
        self._most, self._seconds = limit.num_bytes, limit.period_seconds
        self._since, self._used = 0.0, 0

    def add(self, num_bytes: int, now: float) -> None:
        """Count bytes as of now."""
        self._since = self._since if self.used(now) else now
        self._used += num_bytes

    def used(self, now: float) -> int:
        """Bytes of the period that runs, with those that were too many before; 0 where none runs."""
        num_periods = max(0, math.floor((now - self._since) / self._seconds))
        self._since, self._used = self._since + num_periods * self._seconds, max(0, self._used - num_periods * self._most)
        return self._used

    def again_seconds(self, now: float) -> float:
        """How long it takes until bytes may be moved again; 0 where they may."""
        return self.left_seconds(now, self._most - 1)

    def left_seconds(self, now: float, num_bytes: int) -> float:
        """How long it takes until no more than these are used that are used now; 0 where it is so already."""
        num_periods = -(-max(0, self.used(now) - num_bytes) // self._most)
        return max(0.0, self._since + num_periods * self._seconds - now) if num_periods else 0.0


@dataclass(slots=True, eq=False)
class _Claim:
    """An exchange that waits for its tokens."""

    num_tokens: int


class Account:
    """One tenant's."""

    def __init__(self, tenant: str, limits: TenantLimits, clock: Callable[[], float]) -> None:
        self._tenant, self._limits, self._clock, self._lock = tenant, limits, clock, threading.Lock()
        rate, bound = limits.tokens_per_second, limits.bytes
        self._bucket = None if rate is None else Bucket(rate, limits.burst_tokens, clock())
        self._period = None if bound is None else Period(bound)
        self._line: list[_Claim] = []
        self._held_seconds = 0.0

    def add_bytes(self, num_bytes: int) -> None:
        """Something was sent or received."""
        if self._period is not None:
            with self._lock:
                self._period.add(num_bytes, self._clock())

    def over_bytes(self) -> Over | None:
        """The limit, where the tenant has moved as many bytes as it may."""
        bound = self._limits.bytes
        if bound is None or self._period is None:
            return None
        with self._lock:
            now = self._clock()
            used, left = self._period.used(now), self._period.again_seconds(now)
        if used < bound.num_bytes:
            return None
        what = "devices with the same certificate name" if self._tenant else "devices"
        return Over(
            "tenant_bytes", f"at most {bound.to_text()}, of all {what} together", f"{format_bytes(used)} ({used} bytes) used",
            f"come again in {format_wait(left)}", left,
        )  # fmt: skip

    def admit(self, num_tokens: int, hold: Callable[[Over], None]) -> Over | None:
        """Take tokens for an exchange, first come, first served; `hold` waits a while, again and again, where they are not there yet.

        Returns the limit that forbids the exchange; nothing is taken then, nor where `hold` raises.
        """
        claim, begun = _Claim(num_tokens), self._clock()
        with self._lock:
            self._line.append(claim)
        try:
            while True:
                over = self.over_bytes()
                if over is not None:
                    return over
                seconds = self._take(claim)
                if not seconds:
                    return None
                hold(self._over_tokens(num_tokens, seconds))
        finally:
            with self._lock:
                self._held_seconds += self._clock() - begun
                self._line = [other for other in self._line if other is not claim]

    def use(self) -> Use:
        """As of now."""
        with self._lock:
            now = self._clock()
            left = 0.0 if self._bucket is None else self._bucket.level(now)
            if self._period is None:
                return Use(self._limits, left, self._held_seconds, 0, 0.0, 0.0)
            free, again = self._period.left_seconds(now, 0), self._period.again_seconds(now)
            return Use(self._limits, left, self._held_seconds, self._period.used(now), free, again)

    def _take(self, claim: _Claim) -> float:
        """Take what is claimed if it is there; else how long that is away."""
        with self._lock:
            if self._bucket is None:
                return 0.0
            now, place = self._clock(), self._line.index(claim)
            seconds = self._bucket.wait_seconds([other.num_tokens for other in self._line[: place + 1]], now)
            if not seconds and place == 0:
                self._bucket.take(claim.num_tokens, now)
                self._line = self._line[1:]
                return 0.0
            return seconds or AGAIN_SECONDS  # The one before takes its own at this moment.

    def _over_tokens(self, num_tokens: int, seconds: float) -> Over:
        limits = self._limits
        return Over(
            "tenant_tokens", f"{limits.tokens_per_second:g} tokens a second with padding, {limits.burst_tokens:g} at once",
            f"{counted(num_tokens, 'token')} now, after those of this tenant before",
            f"let [wire] reconnect be longer than {format_wait(seconds)}, or lower train.batch_size", seconds,
        )  # fmt: skip


class Budgets:
    """The accounts of all tenants; `limits` gives each one's."""

    def __init__(self, limits: Callable[[str], TenantLimits], clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock, self._lock = limits, clock, threading.Lock()
        self._accounts: dict[str, Account] = {}

    def of(self, tenant: str) -> Account:
        """The account of a tenant, who may be new."""
        with self._lock:
            if tenant not in self._accounts:
                self._accounts[tenant] = Account(tenant, self._limits(tenant), self._clock)
            return self._accounts[tenant]

    def uses(self, tenant: str | None) -> dict[str, Use]:
        """What each tenant that has been here has used; of one tenant only, unless that is None."""
        with self._lock:
            accounts = sorted(item for item in self._accounts.items() if tenant in (None, item[0]))
        return {name: account.use() for name, account in accounts}
