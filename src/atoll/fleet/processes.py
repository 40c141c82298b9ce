"""Processes that a fleet's commands start. They end with who started them, however that ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from atoll.errors import HostLostError

_GRACE_SECONDS = 10.0
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)  # The parent is gone already.
os.execv(sys.argv[2], sys.argv[2:])
"""


class Child:
    """A process that ends with this one. Its output goes to a file."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._start = file.tell()
            self._process = subprocess.Popen(
                [*_ending_with_parent(), *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which then ends its children in their order.
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def said(self) -> str:
        """What it has written so far."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def wait_for(self, words: str, seconds: float) -> None:
        """Until it has written these words.

        Raises: HostLostError where it ends before, or does not in time.
        """
        deadline = time.monotonic() + seconds
        while words not in (said := self.said()):
            if self.status is not None or time.monotonic() > deadline:
                what = f"it ended with status {self.status}" if self.status is not None else f"nothing of it in {seconds:g} s"
                raise HostLostError(
                    f"{self.name} does not start", where=str(self.log), got="; ".join([what, *said.strip().splitlines()[-3:]]),
                    expected=f"{words!r} in its output", do="read its log; is the address in use?",
                )  # fmt: skip
            time.sleep(0.05)

    def stop(self) -> None:
        """Ask it to end, and end it if it does not; may be called twice."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


_given: set[int] = set()


def free_port() -> int:
    """A port of this machine that nothing listens on, and another one at every call: the system may give the same one twice."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port


def until_ready(check: Callable[[], bool], seconds: float) -> bool:
    """Whether something comes true in time."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _ending_with_parent() -> list[str]:
    """What starts a command so that it is told when this process dies, even by a signal that cannot be caught. Elsewhere than on Linux it
    may outlive it. A program does it, and not the forked child of this one, in which gRPC's threads would be missing."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())] if sys.platform == "linux" else []
