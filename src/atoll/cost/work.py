"""What training work cost by formula, beside what the same steps would cost with every module active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Self, TypeVar

from atoll.cost.formulas import Flops
from atoll.cost.traffic import WireBytes

T = TypeVar("T", Flops, WireBytes)


@dataclass(frozen=True, slots=True)
class Work:
    """Some optimizer steps of an edge."""

    flops: Flops = field(default_factory=lambda: Flops(0, 0, 0))
    wire: WireBytes = field(default_factory=WireBytes)
    full_pool_flops: Flops = field(default_factory=lambda: Flops(0, 0, 0))
    full_pool_wire: WireBytes = field(default_factory=WireBytes)
    num_active: int = 0
    """Modules trained, summed over the steps."""
    num_pool: int = 0
    """Modules that could have been."""
    num_round_trips: int = 0
    """Between the edge and its host, where it has one."""
    host_flops: int = 0
    """Of its host, for it."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.wire + other.wire, self.full_pool_flops + other.full_pool_flops,
            self.full_pool_wire + other.full_pool_wire, self.num_active + other.num_active, self.num_pool + other.num_pool,
            self.num_round_trips + other.num_round_trips, self.host_flops + other.host_flops,
        )  # fmt: skip

    @property
    def active_share(self) -> float:
        """Mean over the steps of the share of modules that were trained; 1 for no steps."""
        return self.num_active / self.num_pool if self.num_pool else 1.0

    def to_numbers(self) -> dict[str, int]:
        """As a flat record: "wire.up_bytes", "num_active", ..."""
        found: dict[str, int] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, int):
                found[entry.name] = value
            else:
                found |= {f"{entry.name}.{part.name}": getattr(value, part.name) for part in fields(value)}
        return found

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, int]) -> Self:
        """What `to_numbers` made, among other things.

        Raises: KeyError where something is missing.
        """

        def read(kind: type[T], name: str) -> T:
            return kind(**{part.name: numbers[f"{name}.{part.name}"] for part in fields(kind)})

        return cls(
            read(Flops, "flops"), read(WireBytes, "wire"), read(Flops, "full_pool_flops"), read(WireBytes, "full_pool_wire"),
            numbers["num_active"], numbers["num_pool"], numbers["num_round_trips"], numbers["host_flops"],
        )  # fmt: skip
