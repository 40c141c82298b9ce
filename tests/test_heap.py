"""Pages that are free go back to the system, also from between others that are not."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
from atoll.cost.meters import resident_bytes
from atoll.heap import give_freed_pages_back, share_one_heap
share_one_heap()
pieces = [bytes(60_000) for _ in range(2_000)]
del pieces[::2]
before = resident_bytes()
give_freed_pages_back()
print(before - resident_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_holes_in_the_heap_are_given_back() -> None:
    """A thousand holes of 60 kB, of which some pages are shared with what is beside them."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 30_000_000
