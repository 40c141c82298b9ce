"""Text files as columns, in one way for good rows and bad: line by line, so that each knows its place."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from atoll.errors import BadRowError, DataFileError, EmptyDataError
from atoll.registry.parts import find, make, names, trait
from atoll.tasks.readers import scan
from atoll.tasks.readers.nearest import did_you_mean
from atoll.tasks.readers.reader import FileRows, GrowingColumns, OnBadRow, Origin, check_columns
from atoll.tasks.readers.unpack import PACKED, check_unpacked, member_name, opened, unpacked_name, whole

FORMS = ".jsonl .json .csv .tsv .parquet .arrow, also packed as .gz .bz2 .xz .zst .zip"


def reader_of(path: Path) -> str | None:
    """The built-in reader of a file, by its suffix, packed or not, or by that of an archive's one file; None where it says nothing."""
    return next((one for one in names("reader") if _is_called(path, trait("reader", one, "suffixes"))), None)


def _is_called(path: Path, suffixes: tuple[str, ...]) -> bool:
    return unpacked_name(path).endswith(suffixes) or unpacked_name(Path(member_name(path))).endswith(suffixes)


class _Text(ABC):
    """Text that is read row by row."""

    def read(self, origin: Origin, on_bad_row: OnBadRow) -> FileRows:
        """All rows of one file.

        Raises: DataFileError, EmptyDataError, BadRowError.
        """
        check_unpacked(origin)
        columns, records, skipped, notes = GrowingColumns(origin.name, origin.limits), array("q"), 0, list[str]()
        for number, record in enumerate(_checked(origin, self.scan(origin, notes), on_bad_row)):
            if record.problem:
                skipped += 1
            else:
                columns.add(record.values)
                records.append(number)
        if not records and not skipped:
            raise EmptyDataError(
                "the data file has no rows", where=origin.name, got="no row below the header, or an empty list",
                expected="at least one row", do="give a file with rows",
            )  # fmt: skip
        return FileRows(columns.values, np.array(records, dtype=np.int64), skipped, tuple(notes))

    def line(self, origin: Origin, record: int) -> int | None:
        """Where one record begins; None where there is no such record any more."""
        return next((found.line for number, found in enumerate(self.scan(origin, [])) if number == record), None)

    @abstractmethod
    def scan(self, origin: Origin, notes: list[str]) -> Iterator[scan.Record]:
        """Every row of a file in order, good or bad, and what should be told of the file.

        Raises: DataFileError, EmptyDataError.
        """


class Csv(_Text):
    """[data] reader = "csv"."""

    suffixes = (".csv", ".tsv", ".tab")

    def scan(self, origin: Origin, notes: list[str]) -> Iterator[scan.Record]:
        """As _Text."""
        with opened(origin) as stream:
            lines = scan.Lines(stream, origin.name, origin.limits.row_bytes, universal=True)
            tabs = _is_called(origin.path, (".tsv", ".tab"))
            try:
                header, delimiter = scan.csv_header(lines, "\t" if tabs else None)
            except scan.LongRowError:
                raise _long_header(origin) from None
            if not header:
                raise _no_text(origin)
            if lines.other_byte:
                raise scan.encoding_error(origin.name, lines.number, lines.other_byte)
            check_columns(origin.name, len(header))
            header = [name or f"Unnamed: {number}" for number, name in enumerate(header)]  # As pandas and `datasets` call it.
            _check_header(origin, header)
            if delimiter != "," and not tabs:
                notes.append(f"{origin.name} is read as values with {scan.DELIMITERS[delimiter]} between them")
            swallowed = list[tuple[int, int]]()
            for record in scan.scan_csv(lines, header, delimiter):
                yield record
                if record.problem and lines.number > record.line:
                    swallowed.append((record.line, lines.number))
            if swallowed:
                first, last = swallowed[0]
                notes.append(
                    f"{len(swallowed)} bad rows of {origin.name} go over several lines, by their quotes: all that stands there is left out "
                    f"(first: lines {first} to {last})"
                )


class JsonLines(_Text):
    """[data] reader = "jsonl"."""

    suffixes = (".jsonl", ".ndjson")

    def scan(self, origin: Origin, notes: list[str]) -> Iterator[scan.Record]:
        """As _Text."""
        with opened(origin) as stream:
            lines = scan.Lines(stream, origin.name, origin.limits.row_bytes)
            yield from scan.scan_jsonl(lines)
            if not lines.has_text:
                raise _no_text(origin)


class Json(_Text):
    """[data] reader = "json"."""

    suffixes = (".json",)

    def scan(self, origin: Origin, notes: list[str]) -> Iterator[scan.Record]:
        """As _Text."""
        text = scan.decoded(whole(origin), origin.name).removeprefix("\ufeff")
        if not text.strip():
            raise _no_text(origin)
        if scan.is_jsonl(text):
            yield from scan.scan_jsonl(scan.Lines(io.BytesIO(text.encode(errors="surrogateescape")), origin.name, origin.limits.row_bytes))
            return
        if text.lstrip()[0] == "{" and (found := scan.only_list(text)) is not None:
            notes.append(f"of {origin.name} the list {found[0]!r} is read")
            text = found[1]
        if text.lstrip()[0] != "[":
            raise _no_list(origin, text)
        yield from scan.scan_json(text, origin.limits.row_bytes)


def place(origin: Origin, record: int) -> str:
    """Where one record of a file stands: "notes.csv, line 12"."""
    reader = make("reader", origin.reader) if find("reader", origin.reader).is_built_in else None
    line = reader.line(origin, record) if isinstance(reader, _Text) else None
    return f"{origin.name}, row {record + 1}" if line is None else f"{origin.name}, line {line}"


def _no_text(origin: Origin) -> EmptyDataError:
    return EmptyDataError("the data file is empty", where=origin.name, got="no text", expected="rows", do="give a file with rows")


def _long_header(origin: Origin) -> DataFileError:
    return DataFileError(
        "the header is longer than a row may be", where=f"{origin.name}, line 1", got="one line without an end",
        expected="at most [data] largest_row", do="see whether the file is what its name says",
    )  # fmt: skip


def _check_header(origin: Origin, header: list[str]) -> None:
    seen: set[str] = set()
    for number, name in enumerate(header, start=1):
        if name in seen:
            raise DataFileError(
                "two columns have one name", where=f"{origin.name}, line 1, column {header.index(name) + 1}",
                got=f"{name!r} twice, again as column {number}",
                expected="a header row with different names", do="rename one of the columns",
            )  # fmt: skip
        seen.add(name)


def _no_list(origin: Origin, text: str) -> DataFileError:
    (record,) = scan.scan_json(text, origin.limits.row_bytes)
    return DataFileError(
        "the JSON file holds no list of rows", where=f"{origin.name}, line {record.line}", got=record.problem, expected=record.expected,
        do="put the rows into one list at the top, or one object on each line of a .jsonl file",
    )  # fmt: skip


def _checked(origin: Origin, records: Iterable[scan.Record], on_bad_row: OnBadRow) -> Iterator[scan.Record]:
    for record in records:
        if record.problem and on_bad_row == "error":
            if record.expected == scan.UTF_8:
                raise scan.encoding_error(origin.name, record.line, record.problem)
            raise BadRowError(
                "a row cannot be read", where=f"{origin.name}, line {record.line}", got=record.problem, expected=record.expected,
                do='mend the row, or set on_bad_row = "skip" in [data] to leave such rows out',
            )  # fmt: skip
        yield record


def unknown_suffix(name: str, path: Path) -> DataFileError:
    """The error for a file whose suffix names no format that is read."""
    suffix = path.suffix if path.suffix.lower() not in PACKED else "".join(path.suffixes[-2:])
    if path.suffix.lower() == ".zip":
        return DataFileError(
            "the archive is not one data file", where=name, got="several files in it, or one whose suffix is not known",
            expected=f"one file in it: {FORMS.partition(', ')[0]}", do="unpack it, and name the folder or the file",
        )  # fmt: skip
    if suffix.lower() in (".txt", ".text", ".md"):
        return DataFileError(
            "it is not said what of the file is a row", where=name, got=suffix, expected=FORMS,
            do='write each text as a row of a .jsonl file: {"text": "..."}',
        )  # fmt: skip
    known = [one for name in names("reader") for one in trait("reader", name, "suffixes")]
    return DataFileError(
        "the data file has a suffix that is not known", where=name, got=suffix or "no suffix", expected=FORMS,
        do=did_you_mean(suffix, known, "convert the file, or rename it if it is one of these already"),
    )  # fmt: skip
