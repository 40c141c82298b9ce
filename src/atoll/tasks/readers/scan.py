"""Read text data row by row with the standard library: slower than pyarrow, but it knows every line and what is wrong with it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

TextKind = Literal["csv", "jsonl", "json"]
LIST = "a list of objects: [{...}, {...}]"

csv.field_size_limit(2**31 - 1)  # The default of 128 KiB refuses long documents.


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in a file: its values, or why there are none."""

    line: int
    values: Mapping[str, object]
    problem: str = ""
    expected: str = ""


def scan(text: str, kind: TextKind) -> Iterator[Record]:
    """Every row of a file in order, good or bad. A JSON document that is no list of rows is one bad row."""
    return {"csv": _scan_csv, "jsonl": _scan_jsonl, "json": _scan_json}[kind](text)


def _scan_csv(text: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            yield Record(line, {}, f"broken quoting: {problem}", 'a quoted value ends with one ", and a " inside it is written twice')
            continue
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = cells
        elif len(cells) != len(header):
            yield Record(line, {}, f"{len(cells)} values", f"{len(header)} values, one for each column of the header")
        else:
            yield Record(line, dict(zip(header, cells, strict=True)))


def csv_header(text: str) -> list[str]:
    """The column names of a CSV file; none where it is empty."""
    reader = csv.reader(io.StringIO(text, newline=""))
    return next((cells for cells in reader if cells), [])


def _scan_jsonl(text: str) -> Iterator[Record]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for line, part in enumerate(text.split("\n"), start=1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except json.JSONDecodeError as problem:
            yield Record(line, {}, f"broken JSON at column {problem.colno}: {problem.msg}", "one whole JSON object on each line")
        except RecursionError:
            yield Record(line, {}, "JSON nested too deeply", "one flat JSON object on each line")
        else:
            yield _object(line, value)


def _scan_json(text: str) -> Iterator[Record]:
    decoder, position, line, seen = json.JSONDecoder(), _skip(text, 0), 1, 0
    if text[position : position + 1] != "[":
        yield Record(1 + text.count("\n", 0, position), {}, _what_instead(text, position), LIST)
        return
    position = _skip(text, position + 1)
    while text[position : position + 1] not in ("]", ""):
        line, seen = line + text.count("\n", seen, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as problem:
            yield Record(problem.lineno, {}, f"broken JSON at column {problem.colno}: {problem.msg}", LIST)
            return
        except RecursionError:
            yield Record(line, {}, "JSON nested too deeply", LIST)
            return
        yield _object(line, value)
        position = _skip(text, position)
        if text[position : position + 1] not in ("]", ","):
            break
        position = _skip(text, position + (text[position] == ","))
    if text[position : position + 1] != "]" or _skip(text, position + 1) < len(text):
        closed = text[position : position + 1] == "]"
        problem_text = "text after the list" if closed else "the list is neither continued by a comma nor closed"
        yield Record(1 + text.count("\n", 0, position), {}, problem_text, LIST)


def _object(line: int, value: object) -> Record:
    if isinstance(value, dict):
        return Record(line, value)
    return Record(line, {}, f"a JSON {_json_type(value)}", 'an object with named columns: {"column": "value"}')


def _what_instead(text: str, position: int) -> str:
    try:
        return f"a JSON {_json_type(json.loads(text))} at the top"
    except (json.JSONDecodeError, RecursionError):
        return f"text that begins with {text[position : position + 10]!r}"


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
