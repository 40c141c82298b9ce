"""What a tenant may have, and how people write it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from atoll.units import counted, format_bytes, parse_bytes

BURST_SECONDS = 10.0
"""What a tenant may use at once after a pause, unless it is said: the tokens of so long a time."""
_PERIODS = {"hour": 3600.0, "day": 86400.0}
BYTES_EXAMPLE = "a size in a period, such as '20 GB/day' or '500 MiB/hour'"


@dataclass(frozen=True, slots=True)
class ByteLimit:
    """Bytes of frames, both directions together, in a period that begins with the first of them."""

    num_bytes: int
    period: str
    """A key of the periods: "hour" or "day"."""

    @property
    def period_seconds(self) -> float:
        """Its length."""
        return _PERIODS[self.period]

    def to_text(self) -> str:
        """As people write it; what is not round to three digits, to the byte."""
        size = format_bytes(self.num_bytes)
        return f"{size if parse_bytes(size) == self.num_bytes else f'{self.num_bytes} B'}/{self.period}"


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may have; None: as much as the host has."""

    sessions: int | None = None
    """At a time."""
    tokens_per_second: float | None = None
    """Positions of its exchanges, padding included, all its sessions together."""
    burst: int | None = None
    """Positions that may be used at once after a pause; None: those of `BURST_SECONDS`."""
    bytes: ByteLimit | None = None
    idle_seconds: float | None = None
    """How long a session may wait for its next exchange."""
    silence_seconds: float | None = None
    """How long it may wait for all of them together."""

    @property
    def burst_tokens(self) -> float:
        """What the bucket holds."""
        return self.burst if self.burst is not None else BURST_SECONDS * (self.tokens_per_second or 0.0)

    def to_text(self) -> str:
        """One line for the host's owner."""
        said: Sequence[str | None] = (
            None if self.sessions is None else counted(self.sessions, "session"),
            None if self.tokens_per_second is None else f"{self.tokens_per_second:g} tokens/s (at once {self.burst_tokens:g})",
            None if self.bytes is None else self.bytes.to_text(),
            None if self.idle_seconds is None else f"idle for {self.idle_seconds:g} s",
            None if self.silence_seconds is None else f"silent for {self.silence_seconds:g} s in all",
        )
        return ", ".join(one for one in said if one is not None) or "no limits of its own"


def parse_byte_limit(text: str) -> ByteLimit:
    """A limit from "20 GB/day" or "500 MiB per hour".

    Raises: ValueError, with an example of what is understood.
    """
    match = re.fullmatch(r"(.*?)\s*(?:/|\bper\b)\s*(hour|day)\s*", text)
    try:
        num_bytes = 0 if match is None else parse_bytes(match[1])
    except (ValueError, OverflowError):
        num_bytes = 0
    if match is None or not 1 <= num_bytes < 2**63:
        raise ValueError(f"{text!r} is not {BYTES_EXAMPLE}")
    return ByteLimit(num_bytes, match[2])
