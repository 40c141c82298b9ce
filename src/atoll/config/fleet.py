"""Edges that run.toml only names: the [[edge]] sections of a fleet file, and what a machine was found to have (its profile)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from atoll.config.document import Document, Location, few, read_document
from atoll.config.keys import as_toml
from atoll.config.quantities import BitsPerSecond, Bytes, BytesOrZero, FlopsPerSecond, SecondsOrZero
from atoll.config.schema import Section
from atoll.errors import ConfigFileError, ConflictError, InputError, UnknownKeyError
from atoll.parsed import parse_json

PROFILE_VERSION: Final = 1
_FLEET: Location = ("run", "fleet")
_PATHS = ("data", "profile")
_DATA_FILE = re.compile(r".*\.(jsonl|ndjson|json|csv|tsv|tab|parquet|arrow)(\.(gz|bz2|xz|zst|zip))?", re.IGNORECASE)
_MEASURE = "measure again, on that machine: atoll doctor --profile"


class Profile(Section):
    """What `atoll doctor --profile` writes: what a machine has, each as the [[edge]] key of its name; null where it was not measured."""

    version: Literal[1] = PROFILE_VERSION
    memory: Bytes | None = None
    process_memory: BytesOrZero | None = None
    flops: FlopsPerSecond | None = None
    bandwidth: BitsPerSecond | None = None
    latency: SecondsOrZero | None = None
    measured: dict[str, object] = {}
    """How and when; for people."""

    def of_edge(self) -> dict[str, object]:
        """The [[edge]] keys that it fills."""
        keys = ("memory", "process_memory", "flops", "bandwidth", "latency")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


def with_fleet(document: Document) -> tuple[Document, list[InputError]]:
    """The document with the [[edge]] sections of the fleet file that it names; itself where it names none, or one that cannot be used."""
    run = document.table.get("run")
    name = run.get("fleet") if isinstance(run, dict) else None
    if not isinstance(run, dict) or not isinstance(name, str) or not name:
        return document, []  # What is no text is the schema's to refuse.
    path = document.path.parent / Path(name).expanduser()
    try:
        fleet = _read_fleet(document, name, path)
    except ConfigFileError as error:
        return document, [error]
    errors: list[InputError] = [_other_section(key, fleet) for key in fleet.table if key != "edge"]
    if "edge" in document.table:
        what, got = "edges stand in run.toml and in a fleet file", f"[[edge]] in {document.path}, and fleet = {as_toml(name)}"
        do = "move the edges into one of the two, or take fleet out"
        errors.append(ConflictError(what, where=document.where(_FLEET), got=got, expected="one of the two", do=do))
    elif not fleet.table.get("edge"):
        got = "a file without [[edge]]"
        errors.append(ConfigFileError("the fleet file has no edges", where=str(path), got=got, expected="[[edge]] sections", do="add them"))
    if errors:
        return document, errors
    edges, folder = fleet.table["edge"], Path(name).parent
    moved = [_moved(edge, folder, path.parent) for edge in edges] if isinstance(edges, list) else edges
    # What holds is the edges and no longer the file's name: so it is kept in a run directory, which the file does not follow.
    own = {key: value for key, value in run.items() if key != "fleet"}
    return replace(document, table={**document.table, "run": own, "edge": moved}, fleet=fleet), []


def with_profiles(document: Document) -> tuple[Document, list[InputError]]:
    """The document with the edges' profiles read: they fill the keys that an edge does not declare."""
    edges = document.table.get("edge")
    if not isinstance(edges, list):
        return document, []
    profiles = _Profiles(document)
    filled = [profiles.fill(number, edge) for number, edge in enumerate(edges)]
    return replace(document, table={**document.table, "edge": filled}), profiles.errors


@dataclass(slots=True)
class _Profiles:
    """The profiles of one reading: each file is read, and found fault with, once."""

    document: Document
    read: dict[Path, Mapping[str, object]] = field(default_factory=dict)
    errors: list[InputError] = field(default_factory=list)

    def fill(self, number: int, edge: object) -> object:
        """An edge with what its profile says, and without the profile: the values are what holds from here on."""
        name = edge.get("profile") if isinstance(edge, dict) else None
        if not isinstance(edge, dict) or not isinstance(name, str) or not name:
            return edge
        path = self.document.path.parent / Path(name).expanduser()
        if path not in self.read:
            self.read[path] = {}
            try:
                self.read[path] = read_profile(path, self.document.where(("edge", number, "profile"))).of_edge()
            except ConfigFileError as error:
                self.errors.append(error)
        # What a process takes of the memory that was measured says nothing of another that is declared.
        found = {key: value for key, value in self.read[path].items() if key != "process_memory" or "memory" not in edge}
        return {**found, **{key: value for key, value in edge.items() if key != "profile"}}


def read_profile(path: Path, where: str) -> Profile:
    """The profile at `path`; `where` is the place that names it.

    Raises: ConfigFileError for a file that is missing, is not JSON, or is not as `atoll doctor --profile` writes it.
    """
    do = f"{_MEASURE} {path.name}"
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing("profile", where, path, "*.json", do) from None
    except OSError as problem:
        got = f"{path}: {problem.strerror or problem}"
        raise ConfigFileError("the profile cannot be read", where=where, got=got, expected="a file", do="check the path") from None
    except ValueError as problem:
        got = f"{path}: {problem}"
        raise ConfigFileError("the profile is not JSON", where=where, got=got, expected="JSON in UTF-8", do=do) from None
    version = value.get("version") if isinstance(value, dict) else None
    if version != PROFILE_VERSION:
        got = f"{path}: version {json.dumps(version)}" if isinstance(value, dict) else f"{path}: no object"
        what, expected = "the profile is not of this version", f"an object with version {PROFILE_VERSION}"
        raise ConfigFileError(what, where=where, got=got, expected=expected, do=do)
    try:
        return Profile.model_validate(value)
    except ValidationError as error:
        raise _bad_profile(error, path, where, do) from None


def _bad_profile(error: ValidationError, path: Path, where: str, do: str) -> ConfigFileError:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    got = f"{path}: {key} = {as_toml(first['input'])[:80]}"
    if first["type"] == "extra_forbidden":
        expected = f"only the keys {', '.join(Profile.model_fields)}"
        return ConfigFileError(f"the profile has an unknown key {key!r}", where=where, got=got, expected=expected, do=do)
    expected = "an object" if key == "measured" else "a number above 0, or null"
    return ConfigFileError(f"the profile has a wrong value for {key!r}", where=where, got=got, expected=expected, do=do)


def _read_fleet(document: Document, name: str, path: Path) -> Document:
    if not path.exists():
        do = "check the path; it is relative to run.toml"
        raise _missing("fleet file", document.where(_FLEET), path, "*.toml", do, name)
    return read_document(path)


def _missing(kind: str, where: str, path: Path, pattern: str, do: str, name: str = "") -> ConfigFileError:
    beside = sorted(entry.name for entry in path.parent.glob(pattern)) if path.parent.is_dir() else []
    likely = get_close_matches(path.name, beside, n=1)
    got = f"no file {name or path}; {pattern} files there: {few(beside) or 'none'}"
    do = f"did you mean {likely[0]}? Or {do}" if likely else do
    return ConfigFileError(f"there is no such {kind}", where=where, got=got, expected=f"a {kind}", do=do)


def _other_section(key: str, fleet: Document) -> UnknownKeyError:
    is_table = isinstance(fleet.table[key], dict | list)
    what = f"a fleet file has no section [{key}]" if is_table else f"a fleet file has no key {key!r}"
    do = "write [[edge]]" if get_close_matches(key, ["edge"]) else "move it to run.toml, or take it out"
    return UnknownKeyError(what, where=fleet.where((key,)), got=key, expected="[[edge]] sections and nothing else", do=do)


def _moved(edge: object, folder: Path, found: Path) -> object:
    """An edge of a fleet file in `folder` (as run.toml writes it; `found` is where it lies), its paths made relative to run.toml."""
    if not isinstance(edge, dict):
        return edge
    moved = {key: str(folder / edge[key]) for key in _PATHS if isinstance(edge.get(key), str) and _is_beside(key, edge[key], found)}
    return {**edge, **moved}


def _is_beside(key: str, value: str, folder: Path) -> bool:
    """Whether a value is a path that begins at the fleet file: not one from the root or the home folder, and no data set id."""
    if not value or value.startswith("~") or Path(value).is_absolute():
        return False
    if key == "profile":
        return True
    there = any((folder / value.rsplit(":", words)[0]).exists() for words in range(3))
    return value != "demo" and (value.startswith(".") or _DATA_FILE.fullmatch(value) is not None or there)

