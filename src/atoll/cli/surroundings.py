"""What a command line finds around it: streams that may be closed, full or of another encoding, and signals that ask it to end."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from atoll.errors import CommandLineError

if TYPE_CHECKING:
    from typing_extensions import Buffer

STDERR_FD = 2
_ENDING = tuple(number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None)


class ToldToEnd(KeyboardInterrupt):
    """A signal asked this process to end; what is going on ends as it does at Ctrl-C."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


@contextlib.contextmanager
def endable() -> Iterator[None]:
    """Within, SIGTERM (kill, systemd, Slurm, docker stop) and SIGHUP raise `ToldToEnd`, unless they were ignored before (nohup)."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, _end) for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise ToldToEnd(signal.Signals(number))


def check_current_folder() -> None:
    """Whether the folder that the command was started in is still there: without it libraries end the process with words of their own.

    Raises: CommandLineError.
    """
    try:
        Path.cwd()
    except OSError as problem:
        raise CommandLineError(
            "the current folder is not there any more", where="current folder", got=str(problem.strerror), expected="a folder to start in",
            do="go to another folder, or to this one anew (cd \"$PWD\")",
        ) from None  # fmt: skip


class UnwritableError(OSError):
    """Standard output is full, or its reader went away."""


class _Raw(io.FileIO):
    """A standard stream's descriptor, which stays open. Where errors are shown nobody can be told that the disk is full: work goes on."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as problem:
            if self.fileno() == STDERR_FD and problem.errno != errno.EPIPE:
                return len(memoryview(data))
            raise UnwritableError(problem.errno, problem.strerror) from problem


def open_streams() -> None:
    """Have all three streams there, so that no file is opened in the place of one; what an encoding lacks is written as an escape."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR_FD:
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = _speaking(sys.stdout), _speaking(sys.stderr)


def _speaking(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream.buffer, io.BytesIO) or stream.fileno() > STDERR_FD:
        return stream  # A notebook's or a test's.
    stream.flush()
    raw = _Raw(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering
    )  # fmt: skip


def silence(*names: str) -> None:
    """Write no more to these of "stdout" and "stderr"; the interpreter would try again when it ends, and complain."""
    for name in names:
        setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
