"""What the file format reserves and this version does not do yet. Such a key is refused, never ignored."""

from __future__ import annotations

from collections.abc import Container

from atoll.config.document import Document, Location
from atoll.config.keys import as_toml, keys
from atoll.config.schema import Privacy
from atoll.errors import InputError, UnavailableError

# Key -> the values this version has; the keys below hold at their defaults only.
AVAILABLE: dict[str, tuple[object, ...]] = {}
DEFAULT_ONLY = tuple(f"privacy.{name}" for name in Privacy.model_fields if name != "transforms")
_RESERVED = "the file format reserves the key, so run.toml will read unchanged in a version that has it"


def is_reserved(path: str) -> bool:
    """Whether this version takes the key only at some of the values that the schema allows."""
    return path in AVAILABLE or path in DEFAULT_ONLY


def unavailable(document: Document, reported: Container[str]) -> list[InputError]:
    """One leaf for each value that this version does not have; `reported` names places that are refused already."""
    errors: list[InputError] = []
    for location, path, value in _values(document):
        key = keys().get(path)
        if key is None or not is_reserved(path):
            continue
        allowed = AVAILABLE.get(path, (key.default,))
        if value in allowed or isinstance(value, dict) or document.where(location) in reported:
            continue
        shown = " or ".join(as_toml(item) for item in allowed if item is not None)
        dotted = document.dotted(location)
        errors.append(
            UnavailableError(
                f"{dotted} = {as_toml(value)} is not in this version of Atoll",
                where=document.where(location),
                got=as_toml(value),
                expected=shown or "the key left out",
                do=f"leave {dotted} out{f' or write {shown}' if shown else ''}; {_RESERVED}",
            )
        )
    return errors


def _values(document: Document) -> list[tuple[Location, str, object]]:
    found: list[tuple[Location, str, object]] = []
    for section, table in document.table.items():
        if section == "edge" and isinstance(table, list):
            for number, edge in enumerate(table):
                found += (
                    [((section, number, name), f"edge.{name}", value) for name, value in edge.items()] if isinstance(edge, dict) else []
                )
        elif isinstance(table, dict):
            found += _flat((section,), table)
    return found


def _flat(location: Location, table: dict[str, object]) -> list[tuple[Location, str, object]]:
    found: list[tuple[Location, str, object]] = []
    for name, raw in table.items():
        here = (*location, name)
        value = tuple(raw) if isinstance(raw, list) else raw
        found.append((here, ".".join(map(str, here)), value))
        if isinstance(raw, dict):
            found += _flat(here, raw)
    return found
