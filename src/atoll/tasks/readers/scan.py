"""Text data read row by row with the standard library, which knows every line and what is wrong with it, and changes no value."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import chain
from typing import IO, Literal, NamedTuple

from atoll.errors import DataFileError
from atoll.parsed import is_too_deep
from atoll.units import counted

TextKind = Literal["csv", "jsonl", "json"]
LIST = "a list of objects: [{...}, {...}]"
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
UTF_8 = "text encoded as UTF-8"
_OTHER_BYTE = re.compile("[\udc80-\udcff]")
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive, or an Excel file", b"\xd0\xcf\x11\xe0": "an old Excel or Word file", b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file", b"\x1f\x8b": "what gzip packed", b"BZh": "what bzip2 packed", b"\xfd7zXZ": "what xz packed",
    b"\x28\xb5\x2f\xfd": "what zstd packed", b"%PDF-": "a PDF file", b"SQLite format 3\0": "an SQLite data base",
}  # fmt: skip
"""How files begin that are named .csv or .json all the same."""
_DEEP, _FLAT = "JSON nested too deeply", "a flat JSON object"
_MOST_DIGITS = 4000
"""Python makes no whole number of more than 4,300 digits."""
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)

csv.field_size_limit(2**31 - 1)  # The default of 128 KiB refuses long documents; rows have a limit of their own.


class Record(NamedTuple):
    """One row as it stands in a file: its values, or why there are none."""

    line: int
    values: Mapping[str, object]
    problem: str = ""
    expected: str = ""


class LongRowError(Exception):
    """A row that is longer than allowed; the lines go on behind it, or behind the line that was too much."""


class Lines:
    """The lines of a UTF-8 file, with their ends and without a byte order mark, as few of them in memory as make a row."""

    def __init__(self, stream: IO[bytes], name: str, most_row_bytes: int, *, universal: bool = False) -> None:
        self._stream, self._name, self._most, self._universal = stream, name, most_row_bytes, universal
        self._pieces: Iterator[str] = iter(())
        self._row_bytes = 0
        self.number = 0
        """Of the line that was read last."""
        self.has_text = False
        """Whether any line held more than space."""
        self.other_byte = ""
        """The first one since the row began that is not UTF-8."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces, None)
        if piece is None:
            text = self._read()
            # A lone carriage return ends a line, too, where files of old have them.
            lone = self._universal and "\r" in text.removesuffix("\n").removesuffix("\r")
            self._pieces = iter(io.StringIO(text, newline="")) if lone else iter((text,))
            piece = next(self._pieces)
        self.number += 1
        self.has_text = self.has_text or not piece.isspace()
        self.other_byte = self.other_byte or other_byte(piece)
        return piece

    def begin_row(self) -> None:
        """Count the bytes of a row from here on."""
        self._row_bytes, self.other_byte = 0, ""

    def _read(self) -> str:
        line = self._stream.readline(self._most + 1)
        if not line:
            raise StopIteration
        self._row_bytes += len(line)
        if self._row_bytes > self._most:
            while line and not line.endswith(b"\n"):
                line = self._stream.readline(2**20)
            self.number, self.has_text = self.number + 1, True
            raise LongRowError
        text = decoded(line, self._name, is_begin=not self.number)
        return text if self.number else text.removeprefix("\ufeff")


def decoded(data: bytes, name: str, *, is_begin: bool = True) -> str:
    """UTF-8 as text; a byte that is none becomes half of a surrogate pair, which `other_byte` finds, so that it spoils its row alone.

    Raises: DataFileError where the beginning of a file says that it is no such text at all.
    """
    if is_begin and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise encoding_error(name, 1, "UTF-16", "utf-16")
    what = next((what for begin, what in _NO_TEXT.items() if data.startswith(begin)), "") if is_begin else ""
    if what:
        raise DataFileError(
            "the data file is no text", where=name, got=what, expected="what the file's name says",
            do="name the file by what it is, or save it as CSV or JSON",
        )  # fmt: skip
    return data.decode(errors="surrogateescape")


def other_byte(text: str) -> str:
    """The first byte of decoded text that was not UTF-8, as "byte 0xe9"; empty where there is none."""
    found = None if text.isascii() else _OTHER_BYTE.search(text)
    return "" if found is None else f"byte 0x{ord(found.group()) - 0xDC00:02x}"


def encoding_error(name: str, line: int, got: str, encoding: str = "latin1") -> DataFileError:
    """The error for a file that is not UTF-8."""
    return DataFileError(
        "the data file is not UTF-8", where=f"{name}, line {line}", got=got, expected=UTF_8,
        do=f"convert it, for example: iconv -f {encoding} -t utf-8",
    )  # fmt: skip


def _too_long(line: int) -> Record:
    return Record(line, {}, "a row that is longer than allowed", "at most [data] largest_row")


def csv_header(lines: Lines, delimiter: str | None = None) -> tuple[list[str], str]:
    """The column names of a CSV file, none where it is empty, and what stands between its values: found in the header unless it is given.

    A comma, wherever there is one; else the one of the other three that makes most columns.
    """
    text = ""
    for text in lines:
        if text.strip("\r\n"):
            break
    known = [delimiter] if delimiter else list(DELIMITERS)
    # A quoted name may go over several lines.
    first = next(csv.reader(chain([text], lines), delimiter=known[0]), []) if text.count('"') % 2 else _split(text, known[0])
    if len(first) > 1 or delimiter or text.count('"') % 2:
        return first, known[0]
    found = max(known, key=lambda one: len(_split(text, one)))
    return _split(text, found), found


def _split(text: str, delimiter: str) -> list[str]:
    return next(csv.reader([text], delimiter=delimiter), [])


def scan_csv(lines: Lines, header: Sequence[str], delimiter: str) -> Iterator[Record]:
    """The rows behind a header. An empty value is none, quoted or not, as `datasets` and pandas have it."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = lines.number + 1
        lines.begin_row()
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            yield Record(line, {}, f"broken quoting: {problem}", 'a quoted value ends with one ", and a " inside it is written twice')
            continue
        except LongRowError:
            yield _too_long(line)
            continue
        if cells is None:
            return
        if not cells:
            continue
        if lines.other_byte:
            yield Record(line, {}, lines.other_byte, UTF_8)
        elif len(cells) != len(header):
            yield Record(line, {}, counted(len(cells), "value"), f"{counted(len(header), 'value')}, one for each column of the header")
        else:
            yield Record(line, {name: cell or None for name, cell in zip(header, cells, strict=True)})


def scan_jsonl(lines: Lines) -> Iterator[Record]:
    """An object a line. Only a line feed ends a line: JSON strings may hold U+2028 and its like unescaped."""
    while True:
        line = lines.number + 1
        lines.begin_row()
        try:
            text = next(lines, None)
        except LongRowError:
            yield _too_long(line)
            continue
        if text is None:
            return
        if not text.strip():
            continue
        if lines.other_byte:
            yield Record(line, {}, lines.other_byte, UTF_8)
            continue
        try:
            value = _DECODER.decode(text.strip(" \t\r\n"))
        except json.JSONDecodeError as problem:
            yield Record(line, {}, f"broken JSON at column {problem.colno}: {problem.msg}", "one whole JSON object on each line")
        except RecursionError:
            yield Record(line, {}, _DEEP, _FLAT)
        except _TwiceError as problem:
            yield Record(line, {}, f"the key {str(problem)[:60]!r} twice", "each key once")
        else:
            yield _object(line, value)


def scan_json(text: str, most_row_bytes: int) -> Iterator[Record]:
    """The objects of a list. A document that is no list of rows is one bad row."""
    position, line, seen = _skip(text, 0), 1, 0
    if text[position : position + 1] != "[":
        yield Record(1 + text.count("\n", 0, position), {}, _what_instead(text, position), LIST)
        return
    position = _skip(text, position + 1)
    while text[position : position + 1] not in ("]", ""):
        line, seen = line + text.count("\n", seen, position), position
        try:
            value, end = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as problem:
            yield Record(problem.lineno, {}, f"broken JSON at column {problem.colno}: {problem.msg}", LIST)
            return
        except (RecursionError, _TwiceError) as problem:
            end = _end_of(text, position)
            twice = isinstance(problem, _TwiceError)
            yield Record(line, {}, f"the key {str(problem)[:60]!r} twice" if twice else _DEEP, LIST)
        else:
            found = other_byte(text[position:end])
            record = Record(line, {}, found, UTF_8) if found else _object(line, value)
            yield record if end - position <= most_row_bytes else _too_long(line)
        position = _skip(text, end)
        if text[position : position + 1] not in ("]", ","):
            break
        position = _skip(text, position + (text[position] == ","))
    if text[position : position + 1] != "]" or _skip(text, position + 1) < len(text):
        closed = text[position : position + 1] == "]"
        problem_text = "text after the list" if closed else "the list is neither continued by a comma nor closed"
        yield Record(1 + text.count("\n", 0, position), {}, problem_text, LIST)


def is_jsonl(text: str) -> bool:
    """Whether a text that should be JSON has one object a line, as Hugging Face writes files called .json."""
    begin = _skip(text, 0)
    if text[begin : begin + 1] != "{":
        return False
    try:
        _, end = _DECODER.raw_decode(text, begin)
    except (json.JSONDecodeError, RecursionError, _TwiceError):
        end = _end_of(text, begin)
    rest = _skip(text, end)
    return text[rest : rest + 1] == "{" and "\n" in text[end:rest]


def only_list(text: str) -> tuple[str, str] | None:
    """Of an object that holds one list of objects, as {"version": 1, "data": [{...}]}: its key, and the list's text on its own lines."""
    lists, position = list[tuple[str, int, int]](), _skip(text, 0) + 1
    try:
        while text[position - 1] in "{,":
            key, end = _DECODER.raw_decode(text, _skip(text, position))
            begin = _skip(text, _skip(text, end) + 1)
            value, end = _DECODER.raw_decode(text, begin)
            if isinstance(value, list):
                lists.append((key, begin, end if value and isinstance(value[0], dict) else -1))
            position = _skip(text, end) + 1
    except (ValueError, RecursionError, IndexError):
        return None
    if len(lists) != 1 or lists[0][2] < 0:
        return None
    key, begin, end = lists[0]
    return key, "\n" * text.count("\n", 0, begin) + text[begin:end]


class _TwiceError(ValueError):
    """A key that one object has twice: the parser would keep the second without a word."""


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return made


def _whole(text: str) -> int | Decimal:
    return int(text) if len(text) <= _MOST_DIGITS else Decimal(text)


def _number(text: str) -> float | Decimal:
    value = float(text)
    return value if math.isfinite(value) else Decimal(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_whole, parse_float=_number)


def _end_of(text: str, position: int) -> int:
    """Where a JSON value that is too deep for the parser ends."""
    depth = 0
    for found in _BRACKET.finditer(text, position):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if depth <= 0 and found.group() in "]}":
            return found.end()
    return len(text)


def _object(line: int, value: object) -> Record:
    if isinstance(value, dict):
        nested = any(isinstance(inner, dict | list) for inner in value.values())
        return Record(line, {}, _DEEP, _FLAT) if nested and is_too_deep(value) else Record(line, value)
    return Record(line, {}, f"a JSON {_json_type(value)}", 'an object with named columns: {"column": "value"}')


def _what_instead(text: str, position: int) -> str:
    try:
        return f"a JSON {_json_type(_DECODER.decode(text.strip()))} at the top"
    except _TwiceError:
        return "a JSON object at the top"
    except (ValueError, RecursionError):
        return f"text that begins with {text[position : position + 10]!r}"


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return position if found is None else found.end()
