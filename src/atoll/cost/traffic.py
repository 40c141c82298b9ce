"""What crosses between devices and their hosts: by formula, and really written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WireBytes:
    """Tensor bytes of training exchanges by formula, under both rules of counting."""

    up_bytes: int = 0
    down_bytes: int = 0
    unshared_bytes: int = 0
    """Both directions, with what a module reads sent once for every module."""

    @property
    def shared_bytes(self) -> int:
        """Both directions, with what several modules read sent once for all of them."""
        return self.up_bytes + self.down_bytes

    def __add__(self, other: WireBytes) -> WireBytes:
        return WireBytes(self.up_bytes + other.up_bytes, self.down_bytes + other.down_bytes, self.unshared_bytes + other.unshared_bytes)

    def times(self, count: int) -> WireBytes:
        """The same exchange `count` times."""
        return WireBytes(self.up_bytes * count, self.down_bytes * count, self.unshared_bytes * count)


@dataclass(slots=True, eq=False)
class WireAccount:
    """Bytes of whole frames really written and read by a device, by message kind, over all its sessions."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)

    def copy(self) -> WireAccount:
        """The account as it stands now."""
        return WireAccount(Counter(self.sent), Counter(self.received))

    def since(self, before: WireAccount) -> WireAccount:
        """What was added after `before` was copied."""
        return WireAccount(self.sent - before.sent, self.received - before.received)
