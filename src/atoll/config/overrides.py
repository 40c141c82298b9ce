"""--set section.key=value: one value put on top of run.toml. --method NAME: all those of a published method."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

from atoll.config.document import Document, Location, few, nearest, split_dotted
from atoll.config.keys import OPTIONS, keys
from atoll.errors import InputError, OverrideError
from atoll.parsed import parse_toml
from atoll.registry.methods import METHODS

_FORM = "--set section.key=value, or --set edge.NAME.key=value"
_METHOD = "method="

_OF_IMPORTANCE = (("plan", "refresh"), ("plan", "importance_file"))


def apply_overrides(document: Document, overrides: Sequence[str]) -> tuple[Document, list[InputError]]:
    """The document with every override applied, and the errors of those that cannot be understood; the later of two wins."""
    table = copy.deepcopy(dict(document.table))
    overridden: dict[Location, str] = {}
    errors: list[InputError] = []
    for text, given in _spelled_out(overrides, table, errors):
        try:
            location, value = _understand(text, table)
        except OverrideError as error:
            errors.append(error)
            continue
        if _put(table, location, value):
            overridden[location] = given
    return replace(document, table=table, overridden={**document.overridden, **overridden}), errors


def is_of_edge(override: str) -> bool:
    """Whether an override is of one edge: such a one needs the edges to be there."""
    return override.partition("=")[0].partition(".")[0].strip() == "edge"


def method_of(overrides: Sequence[str]) -> str | None:
    """The method that overrides name: the last, which wins; None where they name none."""
    return next((text.removeprefix(_METHOD) for text in reversed(overrides) if text.startswith(_METHOD)), None)


def _spelled_out(overrides: Sequence[str], table: dict[str, object], errors: list[InputError]) -> Iterator[tuple[str, str]]:
    """Every override with the one that was given, which differ where that names a method; what this does not know leaves the table."""
    for text in overrides:
        name = text.removeprefix(_METHOD)
        if name == text:
            yield text, text
        elif name in METHODS:
            _take_out(table, name)
            yield from ((one, text) for one in METHODS[name])
        else:
            likely = nearest(name, list(METHODS))
            do = f"did you mean {likely}?" if likely else "docs/methods.md says what each of them is"
            errors.append(OverrideError("no such method", where="--method", got=name or "nothing", expected=few(list(METHODS), 20), do=do))


def _take_out(table: dict[str, object], method: str) -> None:
    """Keys that go with other methods alone: run.toml may be written for any of them."""
    by_importance = "plan.importance=svd-sensitivity" in METHODS[method] and "plan.importance=none" not in METHODS[method]
    for section, key in (("federated", "clip_update"), *(() if by_importance else _OF_IMPORTANCE)):
        if isinstance(found := table.get(section), dict):
            found.pop(key, None)


def _understand(text: str, table: dict[str, object]) -> tuple[Location, object]:
    name, equals, raw = text.partition("=")
    # The name of a part may have dots of its own: options."package.module:Object".key.
    parts = split_dotted(name) if name.strip().startswith(f"{OPTIONS}.") else tuple(part.strip() for part in name.split("."))
    where = f"--set {text}"
    if not equals or len(parts) < 2 or not all(parts):
        raise OverrideError(
            "this override cannot be understood", where=where, got=text or "nothing", expected=_FORM, do="name the section too"
        )
    if not raw.strip():
        do = f"give a value; for empty text: --set '{name}=\"\"'"
        raise OverrideError("this override has no value", where=where, got=text, expected=_FORM, do=do)
    if parts[0] == "edge":
        return _edge_location(name, where, table), _value(f"edge.{parts[-1]}", raw.strip())
    return parts, _value(".".join(parts), raw.strip())


def _edge_location(name: str, where: str, table: dict[str, object]) -> Location:
    edge, _, key = name.strip().removeprefix("edge.").rpartition(".")
    edges = table.get("edge")
    found = [entry.get("name") if isinstance(entry, dict) else None for entry in edges] if isinstance(edges, list) else []
    if edge in found:
        return ("edge", found.index(edge), key.strip())
    names = [name for name in found if isinstance(name, str)]
    likely = nearest(edge, names)
    do = f"did you mean edge.{likely}.{key}?" if likely else "edges are declared in run.toml with [[edge]] and a name"
    expected = f"one of the edges {few(names)}" if names else "an edge that run.toml declares; it declares none"
    raise OverrideError("no such edge", where=where, got=edge or "no name", expected=expected, do=do)


def _value(path: str, raw: str) -> object:
    try:
        parsed = parse_toml(f"value = {raw}")
    except ValueError:
        return raw
    value = parsed["value"] if set(parsed) == {"value"} else raw
    key = keys().get(path)
    # A name or a path may look like a number: --set run.name=2024 means the text.
    return raw if key is not None and key.text_only and not isinstance(value, str) else value


def _put(table: dict[str, object], location: Location, value: object) -> bool:
    """Whether there was a table to put it in; where the file has something else there, the schema reports that."""
    here: object = table
    for part in location[:-1]:
        if isinstance(here, dict):
            here = here.setdefault(part, {})
        elif isinstance(here, list) and isinstance(part, int):
            here = here[part]
    if not isinstance(here, dict):
        return False
    here[str(location[-1])] = value
    return True
