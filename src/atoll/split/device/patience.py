"""How long a device tries to reach its host, and what its user is told meanwhile."""

from __future__ import annotations

from collections.abc import Callable

from atoll.errors import FrameError, HostLostError
from atoll.printable import printable
from atoll.units import format_wait

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 8.0
TELL_SECONDS = 30.0
"""What goes on for the same reason is told again after so long."""


class Patience:
    """With one thing that needs the host: it begins with the first loss."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._pause = FIRST_PAUSE_SECONDS
        self._until: float | None = None
        self._told, self._told_at = "", 0.0

    def pause_seconds(self, problem: HostLostError | FrameError) -> float | None:
        """How long to wait before the next try; None: no longer, as patience ends before, or before the host says to come again."""
        now = self._clock()
        self._until = now + self._seconds if self._until is None else self._until
        pause = max(self._pause, _asked_seconds(problem))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return None if now + pause > self._until else pause

    def news(self, problem: HostLostError | FrameError) -> str:
        """What to tell: at once, where the reason is another, and after a while with the time that is left; else empty."""
        now, reason = self._clock(), _reason(problem)
        if reason == self._told and now - self._told_at < TELL_SECONDS:
            return ""
        shown = f"still: {problem.what if _is_of_host(problem) else reason}" if reason == self._told else reason
        self._told, self._told_at = reason, now
        return printable(f"{shown}; trying again for {format_wait((self._until or now) - now)}")


def _asked_seconds(problem: HostLostError | FrameError) -> float:
    return problem.retry_seconds if isinstance(problem, HostLostError) else 0.0


def _is_of_host(problem: HostLostError | FrameError) -> bool:
    """Whether these are the host's own words."""
    return isinstance(problem, HostLostError) and bool(problem.where)


def _reason(problem: HostLostError | FrameError) -> str:
    if _is_of_host(problem):
        return f"{problem.what}: {problem.got}; {problem.expected}; {problem.do}"
    return problem.got or problem.what
