"""How this process takes memory from the system and gives it back: glibc's heap, which keeps what is freed. Elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_MAPPED_BYTES = 2**20


def map_large_tensors() -> None:
    """Have every tensor of a megabyte or more mapped by itself, and unmapped when it is freed.

    Otherwise glibc moves that bound up to 32 MiB by itself, takes tensors from its heap, and keeps the holes: what a process then holds is
    up to three times what it uses, and no formula predicts it. It costs time, as the kernel hands out every page anew: worth it where
    memory is what is short.

    Source: man 3 mallopt, M_MMAP_THRESHOLD.
    """
    _tell("mallopt", _M_MMAP_THRESHOLD, _MAPPED_BYTES)


def share_one_heap() -> None:
    """Have all threads of this process take memory from one heap; to be called before there are others.

    Otherwise glibc gives each its own, which keeps what its thread has freed: of 32 sessions that compute one after the other, each would
    hold the memory that one needs.

    Source: man 3 mallopt, M_ARENA_MAX.
    """
    _tell("mallopt", _M_ARENA_MAX, 1)


def give_freed_pages_back() -> None:
    """Give the system every page of which nothing is in use, wherever in the heap; some 10 ms, and the pages are asked for again.

    Source: man 3 malloc_trim.
    """
    _tell("malloc_trim", 0)


def _tell(function: str, *numbers: int) -> None:
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), function):
        getattr(library, function)(*numbers)
