"""The front's own process: python -m atoll.fleet.front FOLDER SOCKET, for a coordinator's folder and SuperLink's Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import sys
import time
from pathlib import Path

from atoll.fleet.files import CoordinatorFolder, split_address
from atoll.fleet.front.admission import Admission
from atoll.fleet.front.gate import Gate
from atoll.fleet.front.limits import READY, Limits
from atoll.fleet.front.listener import Listener, tls_of
from atoll.split.host.audit import Audit

_WAITING = 512
_LINES_A_MINUTE = 120


class Sparing(logging.Filter):
    """Lets through so many lines a minute: a log must not fill a disk by the will of others."""

    def __init__(self) -> None:
        super().__init__()
        self._minute, self._lines = 0.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether there is room for another in this minute."""
        minute = time.monotonic() // 60
        self._lines = self._lines + 1 if minute == self._minute else 1
        self._minute = minute
        return self._lines <= _LINES_A_MINUTE


def main(folder: Path, superlink: Path) -> None:
    """Serve until this process is ended.

    Raises: OSError where the address is taken, or a file cannot be read.
    """
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("atoll.front").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Sparing())
    with contextlib.suppress(ValueError, OSError):  # As many connections as the system allows this user.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    place, limits = CoordinatorFolder(folder), Limits()
    admission, audit = Admission(place), Audit(place.audit)
    listener = Listener(Gate(superlink, admission, limits, audit), tls_of(place), admission, limits, audit)
    with _listening(place.read().address) as listening:
        print(READY, flush=True)
        asyncio.run(listener.serve(listening))


def _listening(address: str) -> socket.socket:
    """A name or another machine's view of this one cannot be bound to; a loopback address can, and need not be left."""
    host, port = split_address(address, "fleet.json")
    if host not in ("127.0.0.1", "localhost", "::1"):
        return socket.create_server(("", port), backlog=_WAITING)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_WAITING)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
