"""A law that a part breaks, and how checks say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atoll.registry.parts import find, make


class BrokenLaw(AssertionError):
    """What the part did, and what its kind asks for."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The part that is checked."""

    kind: str
    name: str
    options: Mapping[str, object] | None
    sample: Path | None = None
    """A file for a reader."""

    def make(self, *arguments: object) -> Any:
        """A new object of it. Raises: ValueError for options that its own config refuses."""
        try:
            return make(self.kind, self.name, self.options, *arguments)
        except ValidationError as problem:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problem.errors())
            raise ValueError(f"options of {self.name}: {wrong}") from None

    def trait(self, name: str) -> Any:
        """What its class says of itself."""
        return find(self.kind, self.name).trait(name)

    def expect(self, holds: bool, law: str) -> None:
        """Raises: BrokenLaw where it does not hold."""
        if not holds:
            raise BrokenLaw(f"{self.name}: {law}")
