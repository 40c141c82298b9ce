"""Named random streams. Knows nothing of torch: a stream is a 63-bit integer that seeds whichever generator the caller uses."""

from __future__ import annotations

import hashlib


def stream(seed: int, role: str, *, edge: str = "", round: int = 0) -> int:
    """The seed of one named stream: equal arguments give equal streams, and no two roles, edges or rounds share one."""
    name = f"{seed}/{role}/{edge}/{round}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1
