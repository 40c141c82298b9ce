"""Folders for temporary files. They are removed when they are done with, and when this process is told to end (SIGTERM)."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path
from types import FrameType
from weakref import WeakSet

_folders: WeakSet[tempfile.TemporaryDirectory[str]] = WeakSet()


def scratch_folder(prefix: str, parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A new folder that only this user can open, in `parent` or in the system's place for temporary ones (TMPDIR); a context."""
    # Whoever ends on SIGTERM in a way of their own leaves their contexts; Python's way is to end at once.
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)
    folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    _folders.add(folder)
    return folder


def _end(number: int, frame: FrameType | None) -> None:
    for folder in list(_folders):
        folder.cleanup()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # So that whoever waits for this process is told what ended it.
