"""How many threads torch should use for what is at hand: two cores are no gain where every matrix is small."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NARROW = 256
"""Hidden size up to which one thread is faster than two: 2 times at 128, 1.2 at 256, 0.8 at 384 (docs/log.md)."""


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """This many threads for what happens inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def suited_threads(hidden_size: int) -> Iterator[None]:
    """One thread for a narrow base; otherwise, or where OMP_NUM_THREADS says how many, as many as torch has."""
    narrow = hidden_size <= NARROW and "OMP_NUM_THREADS" not in os.environ
    with num_threads(1 if narrow else torch.get_num_threads()):
        yield
