"""run.toml as text and as tables, and where in it each value was written."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from atoll.errors import ConfigFileError
from atoll.parsed import parse_toml

Location = tuple[str | int, ...]  # ("train", "learning_rate"), ("edge", 1, "memory")
_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]#]+?)\s*\]\]?\s*(?:#.*)?")
_PART = r"(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')"
_KEY = re.compile(rf"\s*({_PART}(?:\s*\.\s*{_PART})*)\s*=")
_SYNTAX = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)")


@dataclass(frozen=True, slots=True)
class Document:
    """A run.toml with its overrides applied; `overridden` maps a location to the --set that put a value there."""

    path: Path
    text: str
    table: Mapping[str, object]
    overridden: Mapping[Location, str] = field(default_factory=dict)
    fleet: Document | None = None
    """The file that the [[edge]] sections stand in, where it is another."""

    def where(self, location: Location) -> str:
        """File, line and key of a location, or the --set it comes from."""
        for size in range(len(location), 1, -1):
            if location[:size] in self.overridden:
                return f"--set {self.overridden[location[:size]]} (on top of {self.path})"
        if self.fleet is not None and location[0] == "edge":
            return self.fleet.where(location)
        line = self._line(location)
        return f"{self.path}{f', line {line}' if line else ''}: {self.dotted(location)}"

    def dotted(self, location: Location) -> str:
        """A location as --set would write it: "train.rank", "edge.north.memory"."""
        parts = list(location)
        if len(parts) > 1 and parts[0] == "edge" and isinstance(parts[1], int):
            edges = self.table.get("edge")
            edge = edges[parts[1]] if isinstance(edges, list) else None
            name = edge.get("name") if isinstance(edge, dict) else None
            parts[1] = name if isinstance(name, str) else f"[{parts[1] + 1}]"
        return ".".join(str(part) for part in parts).replace(".[", "[")

    def _line(self, location: Location) -> int | None:
        lines = _line_numbers(self.text)
        for size in range(len(location), 0, -1):
            if location[:size] in lines:
                return lines[location[:size]]
        return None


def read_document(path: Path) -> Document:
    """The file at `path`, parsed and not yet checked.

    Raises: ConfigFileError for a file that is missing, is a folder, is not text or is not TOML.
    """
    text = _read_text(path)
    try:
        return Document(path, text, parse_toml(text))
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, str(error)) from None


def nearest(name: str, known: list[str]) -> str | None:
    """The known name most like `name`, if one is like it at all."""
    lowered = {item.lower(): item for item in known}
    matches = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def few(names: Sequence[str], most: int = 10) -> str:
    """Names for a message, and how many there are where that would be too long."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _read_text(path: Path) -> str:
    try:
        # utf-8-sig: Windows editors put a byte-order mark in front.
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _missing(path) from None
    except IsADirectoryError:
        inside = sorted(path.glob("*.toml"))
        do = f"give the file: {inside[0]}" if inside else "give a run.toml; `atoll init DIR` writes one to start from"
        raise ConfigFileError("this is a folder, not a config file", where=str(path), expected="a run.toml", do=do) from None
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at position {error.start}"
        do = "save the file as UTF-8; if it is not a text file, give the run.toml instead"
        raise ConfigFileError("the file is not UTF-8 text", where=str(path), got=got, expected="a TOML file in UTF-8", do=do) from None
    except OSError as error:
        got = error.strerror or str(error)
        raise ConfigFileError("the file cannot be read", where=str(path), got=got, do="check the path and its permissions") from None


def _missing(path: Path) -> ConfigFileError:
    folder = path.parent
    if not folder.is_dir():
        return ConfigFileError("there is no such file", where=str(path), got=f"no folder {folder}", do="check the path")
    here = sorted(entry.name for entry in folder.glob("*.toml"))
    likely = nearest(path.name, here) or (here[0] if len(here) == 1 else None)
    do = f"did you mean {folder / likely}?" if likely else "`atoll init DIR` writes a run.toml to start from"
    return ConfigFileError("there is no such file", where=str(path), got=f"*.toml files there: {', '.join(here) or 'none'}", do=do)


def _syntax_error(path: Path, text: str, message: str) -> ConfigFileError:
    lines = text.splitlines() or [""]
    match = _SYNTAX.fullmatch(message)
    what = match[1] if match else message
    number, column = (int(match[2]), int(match[3])) if match and match[2] else (len(lines), len(lines[-1]) + 1)
    got = lines[number - 1].strip()[:100] if number <= len(lines) else "the end of the file"
    do = 'text values need quotes (base = "tiny"), sections stand in brackets ([train])'
    where = f"{path}, line {number}, column {column}"
    return ConfigFileError(f"not valid TOML: {what}", where=where, got=got, expected="section.key = value lines in TOML", do=do)


@lru_cache(maxsize=4)
def _line_numbers(text: str) -> Mapping[Location, int]:
    """First line of every table and key: good enough to point at, not a second parser. Kept, as every error of a file asks for it."""
    found: dict[Location, int] = {}
    table: Location = ()
    counts: dict[Location, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.fullmatch(line):
            table = split_dotted(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                found.setdefault(table, number)
                table = (*table, counts[table])
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            location = (*table, *split_dotted(key[1]))
            for size in range(len(table) + 1, len(location) + 1):
                found.setdefault(location[:size], number)
    return found


def split_dotted(dotted: str) -> tuple[str, ...]:
    """The parts of a dotted key, quoted or not."""
    return tuple(part.strip("\"'") for part in re.findall(_PART, dotted))
