"""Who may compute: the tenant that has had the least time, first come, first served within it, and nobody while waiting for a device."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from atoll.split.host.fair_share import FairShare


class ComputeQueue:
    """A lock that is fair between tenants. `settle` waits until an accelerator has done what it was given, so that it can be timed."""

    def __init__(self, settle: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.settle, self.clock = settle, clock
        self.changed = threading.Condition()
        """Holds all of the below."""
        self.share = FairShare()
        self.lines: defaultdict[str, deque[Turns]] = defaultdict(deque)
        """Sessions that wait, by tenant."""
        self.is_free = True

    @contextmanager
    def session(self, tenant: str) -> Iterator[Turns]:
        """The turns of a session that is open inside."""
        with self.changed:
            self.share.enter(tenant)
        try:
            yield Turns(self, tenant)
        finally:
            with self.changed:
                self.share.leave(tenant)
                self.changed.notify_all()  # The processor may be kept for it.


class Turns:
    """One session's turns to compute."""

    def __init__(self, queue: ComputeQueue, tenant: str) -> None:
        self._queue, self._tenant = queue, tenant
        self.seconds, self.waited = 0.0, 0.0
        """Seconds that its turns took so far, and that it waited for them."""

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Compute inside."""
        with self._queue.changed:
            self._take(first=False)
        try:
            yield
        finally:
            self._give(within=False)

    @contextmanager
    def release(self) -> Iterator[None]:
        """Wait for a device inside, within a slot: others compute meanwhile."""
        self._give(within=True)
        try:
            yield
        finally:
            with self._queue.changed:
                self._take(first=False)

    def pause(self) -> None:
        """Within a slot: let a tenant go first that has had less. A long computation calls this often."""
        queue = self._queue
        if queue.share.num_tenants > 1:
            queue.settle()
            with queue.changed:
                self.seconds += queue.share.end(self._tenant, queue.clock(), within=True)
                queue.is_free = True
                self._take(first=True)

    def spent(self) -> float:
        """Seconds that its turns took, with the one that runs."""
        queue = self._queue
        queue.settle()
        with queue.changed:
            return self.seconds + queue.share.running(self._tenant, queue.clock())

    def give_part(self, other: Turns, seconds: float) -> None:
        """So much of what it computed was the other's."""
        with self._queue.changed:
            self._queue.share.move(self._tenant, other._tenant, seconds)
            self.seconds, other.seconds = self.seconds - seconds, other.seconds + seconds

    def _take(self, *, first: bool) -> None:
        queue, line = self._queue, self._queue.lines[self._tenant]
        (line.appendleft if first else line.append)(self)
        begun = queue.clock()
        queue.share.arrive(self._tenant, begun)
        while True:
            tenant, seconds = queue.share.choose(queue.clock()) if queue.is_free else (None, None)
            if tenant == self._tenant and line[0] is self:
                break
            if first:
                queue.changed.notify_all()  # Of a pause nobody else knows yet.
                first = False
            queue.changed.wait(seconds)
        line.popleft()
        now = queue.clock()
        queue.share.begin(self._tenant, now)
        queue.is_free = False
        self.waited += now - begun

    def _give(self, *, within: bool) -> None:
        queue = self._queue
        queue.settle()
        with queue.changed:
            self.seconds += queue.share.end(self._tenant, queue.clock(), within=within)
            queue.is_free = True
            queue.changed.notify_all()
