"""Who asked this machine for what, and what it said: one JSON object a line, only ever added to. Of hosts, fronts and edges of a fleet."""

from __future__ import annotations

import datetime
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from atoll.errors import OutputError

REPEATED = ("call refused", "session refused", "status", "handshake refused", "not let in", "let in", "request refused")
"""What anybody can make happen thousands of times a second: of one caller at most one line a second, with how many there were."""
REPEAT_SECONDS = 1.0


def in_words(facts: Mapping[str, object]) -> str:
    """The facts of a line for whoever reads along: "tokens 12, code busy"."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value != "")


class _PrivateFile(WatchedFileHandler):
    """Opened anew where it was moved away, as rotation does; nobody else's to read, and no link to another place."""

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        handle = os.open(self.baseFilename, flags, 0o600)
        os.fchmod(handle, 0o600)
        return open(handle, "a", encoding="utf-8")


class Audit:
    """Lines of a file; without one nothing is kept.

    Raises: OutputError where the file cannot be opened.
    """

    def __init__(self, file: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._told: dict[tuple[str, str], float] = {}
        """When a line of an event of REPEATED was last written, by event and tenant."""
        self._untold: dict[tuple[str, str], int] = {}
        self._lines = logging.Logger("atoll.audit")
        if file is None:
            self._lines.disabled = True
            return
        try:
            self._lines.addHandler(_PrivateFile(file, encoding="utf-8"))
        except OSError as problem:
            raise OutputError(
                "the audit log cannot be written there", where=str(file), got=problem.strerror or str(problem),
                expected="a file, or a new one in a folder that is there", do="name another file",
            ) from None  # fmt: skip

    def note(self, event: str, tenant: str, peer: str, facts: Mapping[str, object]) -> None:
        """One line: what happened, to whom, when, and the facts. Names of events are those of docs/security.md."""
        times = self._times(event, tenant) if event in REPEATED else 1
        if times and not self._lines.disabled:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "event": event, "tenant": tenant, "peer": peer, **facts, **({"times": times} if times > 1 else {})}
            self._lines.info("%s", json.dumps(line))  # ASCII: what a peer wrote ends no line and moves no cursor.

    def close(self) -> None:
        """Close the file."""
        for handler in self._lines.handlers:
            handler.close()

    def _times(self, event: str, tenant: str) -> int:
        """For how many events of the kind a line stands that is to be written now; 0: for none, as one was written just now."""
        with self._lock:
            key, now = (event, tenant), self._clock()
            self._untold[key] = self._untold.get(key, 0) + 1
            if now - self._told.get(key, float("-inf")) < REPEAT_SECONDS:
                return 0
            self._told[key] = now
            return self._untold.pop(key)
