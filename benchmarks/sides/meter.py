"""Time by part and peak memory of a training process. Imports nothing that either side would not have."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status_bytes(key: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process, in bytes."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


class Parts:
    """Wall seconds by part of the step; parts nest, and an outer part's time excludes what was measured inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def time(self, owner: object, name: str, part: str) -> None:
        """Replace a function by one that adds its time to a part."""
        whole = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return whole(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[part] = self.seconds.get(part, 0.0) + spent - self._inner.pop()
                self._inner[-1] += spent

        setattr(owner, name, timed)


class Meter:
    """Times every step after the warm-up, and waits for its turn before each.

    Two processes that alternate step by step see the same machine. Memory counts from just before the first step.
    """

    def __init__(self, warmup_steps: int, parts: Parts | None) -> None:
        self.warmup_steps, self.parts = warmup_steps, parts
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self.before_bytes = self.earlier_peak_bytes = 0
        self._begin = self._cpu_begin = 0.0

    def start(self) -> None:
        """Call right before training: the peak so far is noted, and counted anew."""
        self.before_bytes, self.earlier_peak_bytes = status_bytes("VmRSS"), status_bytes("VmHWM")
        CLEAR_REFS.write_text("5", encoding="ascii")
        self._wait()

    def step_done(self, loss: float) -> None:
        """Call after every optimizer step."""
        self.seconds.append(time.perf_counter() - self._begin)
        self.cpu_seconds.append(time.process_time() - self._cpu_begin)
        self.losses.append(loss)
        if self.parts is not None and len(self.seconds) == self.warmup_steps:
            self.parts.seconds.clear()
        self._wait()

    def _wait(self) -> None:
        print("ready", flush=True)
        sys.stdin.readline()
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()

    def print_result(self) -> None:
        """One JSON line on standard output."""
        training_peak, seconds = status_bytes("VmHWM"), sum(self.seconds[self.warmup_steps :])
        parts = dict(self.parts.seconds) if self.parts is not None else {}
        if parts:
            parts["the rest"] = seconds - sum(parts.values())
        print(json.dumps({
            "seconds": seconds, "cpu_seconds": sum(self.cpu_seconds[self.warmup_steps :]),
            "peak_bytes": max(training_peak, self.earlier_peak_bytes), "before_bytes": self.before_bytes,
            "rise_bytes": training_peak - self.before_bytes, "losses": self.losses, "parts_seconds": parts,
        }))  # fmt: skip
