"""Who may compute: first come, first served, and nobody while waiting for a device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ComputeQueue:
    """A fair lock: `num_slots` holders at a time, in the order in which they asked."""

    def __init__(self, num_slots: int = 1) -> None:
        self._free = num_slots
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Compute inside."""
        self._take()
        try:
            yield
        finally:
            self._give()

    @contextmanager
    def release(self) -> Iterator[None]:
        """Wait for a device inside, within a slot: others compute meanwhile."""
        self._give()
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        with self._lock:
            if self._free and not self._waiting:
                self._free -= 1
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def _give(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # The slot goes from hand to hand, so that nobody can slip in between.
            else:
                self._free += 1
