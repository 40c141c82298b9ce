"""A host for benchmarks, and the size of the batches that its devices train on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROWS, TOKENS, RANK = 4, 128, 8


@contextmanager
def host(folder: Path, *options: str) -> Iterator[str]:
    """A host of its own process, once it listens: its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "atoll", "host", "--model", str(folder), "--listen", "127.0.0.1:0", *options], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        words = process.stdout.readline().split()
        yield words[words.index("on") + 1]
    finally:
        process.terminate()
        process.wait()
