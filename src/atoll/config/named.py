"""Values of run.toml that name a part: built in, installed, or somebody else's as "module:object"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from atoll.registry.parts import known, names
from atoll.registry.plugins import installed, is_reference

REFERENCE = '"module:object"'


@dataclass(frozen=True, slots=True)
class Named:
    """Marks a text of the schema as the name of a part of this kind, or as one of a few other words."""

    kind: str
    also: tuple[str, ...] = ()

    @property
    def choices(self) -> tuple[str, ...]:
        """What ships with Atoll."""
        return (*self.also, *names(self.kind))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: str) -> str:
        if value not in self.choices and not is_reference(value) and known(self.kind, value) is None and value not in installed(self.kind):
            raise ValueError(f"no {self.kind} is called {value}")
        return value
