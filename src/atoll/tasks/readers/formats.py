"""Files as columns: pyarrow where it can, the line-by-line scan where it cannot or where a row is bad."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from atoll.errors import BadRowError, DataFileError, EmptyDataError
from atoll.registry.parts import find, make, names, trait
from atoll.tasks.readers import scan
from atoll.tasks.readers.nearest import did_you_mean
from atoll.tasks.readers.reader import FileRows, OnBadRow, Origin

if TYPE_CHECKING:
    import pyarrow as pa

# pyarrow is imported where a file is read: batches and the training step do without its memory.
Kind = scan.TextKind
FORMS = ".jsonl .json .csv .parquet, or .jsonl.gz .json.gz .csv.gz"


def reader_of(path: Path) -> str | None:
    """The built-in reader of a file, by its suffix; None where the suffix says nothing."""
    return next((name for name in names("reader") if path.name.lower().endswith(trait("reader", name, "suffixes"))), None)


class _Text:
    """Text that is read at once by pyarrow or, where that cannot be, line by line."""

    kind: Kind

    def read(self, origin: Origin, on_bad_row: OnBadRow) -> FileRows:
        """All rows of one file.

        Raises: DataFileError, EmptyDataError, BadRowError.
        """
        text = read_text(origin)
        if not text.strip():
            raise EmptyDataError("the data file is empty", where=origin.name, got="no text", expected="rows", do="give a file with rows")
        kind = _true_kind(text, self.kind)
        if kind == "csv":
            _check_header(origin, text)
        if kind == "json" and text.lstrip()[0] != "[":
            raise _no_list(origin, text)
        table = _fast(text, kind)
        read = _whole(table) if table is not None else _slow(origin, text, kind, on_bad_row)
        if not len(read.records) and not read.num_skipped:
            raise EmptyDataError(
                "the data file has no rows", where=origin.name, got="a header and nothing else" if kind == "csv" else "an empty list",
                expected="at least one row", do="give a file with rows",
            )  # fmt: skip
        return read

    def line(self, origin: Origin, record: int) -> int | None:
        """Where one record begins; None where there is no such record any more."""
        text = read_text(origin)
        for number, found in enumerate(scan.scan(text, _true_kind(text, self.kind))):
            if number == record:
                return found.line
        return None


class Csv(_Text):
    """[data] reader = "csv"."""

    kind = "csv"
    suffixes = (".csv", ".csv.gz")


class JsonLines(_Text):
    """[data] reader = "jsonl"."""

    kind = "jsonl"
    suffixes = (".jsonl", ".jsonl.gz")


class Json(_Text):
    """[data] reader = "json"."""

    kind = "json"
    suffixes = (".json", ".json.gz")


class Parquet:
    """[data] reader = "parquet"."""

    suffixes = (".parquet",)

    def read(self, origin: Origin, on_bad_row: OnBadRow) -> FileRows:
        """All rows of one file.

        Raises: DataFileError, EmptyDataError.
        """
        return _whole(_read_parquet(origin))


def place(origin: Origin, record: int) -> str:
    """Where one record of a file stands: "notes.csv, line 12"."""
    reader = make("reader", origin.reader) if find("reader", origin.reader).is_built_in else None
    line = reader.line(origin, record) if isinstance(reader, _Text) else None
    return f"{origin.name}, row {record + 1}" if line is None else f"{origin.name}, line {line}"


def read_text(origin: Origin) -> str:
    """A text file, unpacked and decoded, without its byte order mark.

    Raises: DataFileError, naming the line that is not UTF-8.
    """
    try:
        data = origin.path.read_bytes()
        if origin.path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as problem:
        raise DataFileError(
            "the data file cannot be read", where=origin.name, got=str(problem) or type(problem).__name__,
            expected="a readable, whole file",
            do="check the file and its permissions, or write it again",
        ) from None  # fmt: skip
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _encoding_error(origin, 1, "UTF-16", "utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise _encoding_error(origin, line, f"byte 0x{data[problem.start]:02x}", "latin1") from None


def _encoding_error(origin: Origin, line: int, got: str, encoding: str) -> DataFileError:
    return DataFileError(
        "the data file is not UTF-8", where=f"{origin.name}, line {line}", got=got, expected="text encoded as UTF-8",
        do=f"convert it, for example: iconv -f {encoding} -t utf-8",
    )  # fmt: skip


def _true_kind(text: str, kind: Kind) -> scan.TextKind:
    """The kind of a text file. Files called .json often hold one object a line, as Hugging Face writes them."""
    if kind == "json" and text.lstrip()[:1] == "{":
        try:
            json.loads(text)
        except RecursionError:
            return "json"
        except json.JSONDecodeError as problem:
            return "jsonl" if problem.msg == "Extra data" else "json"
    return "csv" if kind == "csv" else "jsonl" if kind == "jsonl" else "json"


def _check_header(origin: Origin, text: str) -> None:
    header = scan.csv_header(text)
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataFileError(
            "two columns have one name", where=f"{origin.name}, line 1, column {header.index(twice[0]) + 1}", got=f"{twice[0]!r} twice",
            expected="a header row with different names", do="rename one of the columns",
        )  # fmt: skip


def _no_list(origin: Origin, text: str) -> DataFileError:
    (record,) = scan.scan(text, "json")
    return DataFileError(
        "the JSON file holds no list of rows", where=f"{origin.name}, line {record.line}", got=record.problem, expected=record.expected,
        do="put the rows into one list at the top, or one object on each line of a .jsonl file",
    )  # fmt: skip


def _fast(text: str, kind: scan.TextKind) -> pa.Table | None:
    """The file through pyarrow, or None where the slow scan must look: pyarrow refuses, or would change what was written."""
    import pyarrow as pa

    try:
        if kind == "csv":
            return _fast_csv(text)
        if kind == "jsonl":
            return _fast_jsonl(text)
    except (pa.ArrowException, UnicodeEncodeError):
        pass
    return None


def _fast_csv(text: str) -> pa.Table | None:
    import pyarrow as pa
    import pyarrow.csv

    if text.count('"') % 2:
        return None  # An open quote swallows the rest of the file without complaint.
    as_text = dict.fromkeys(scan.csv_header(text), pa.string())
    return pyarrow.csv.read_csv(
        pa.BufferReader(text.encode()),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=as_text, strings_can_be_null=False),
    )


def _fast_jsonl(text: str) -> pa.Table | None:
    import pyarrow as pa
    import pyarrow.json

    data = text.encode()
    options = pyarrow.json.ReadOptions(block_size=min(max(len(data), 1), 2**30))
    table = pyarrow.json.read_json(pa.BufferReader(data), read_options=options)
    # pyarrow turns texts that look like dates into dates, 1 into 1.0 beside 1.5, and fills structs up with nulls.
    unchanged = all(_is_plain(field.type) for field in table.schema)
    return table if unchanged and table.num_rows == sum(1 for line in text.split("\n") if line.strip()) else None


def _is_plain(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind):
        return pa.types.is_string(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)


def _whole(table: pa.Table) -> FileRows:
    columns = {name: column.to_pylist() for name, column in zip(table.column_names, table.columns, strict=True)}
    return FileRows(columns, np.arange(table.num_rows), 0)


def _read_parquet(origin: Origin) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(origin.path.read_bytes()))
    except (pa.ArrowException, OSError) as problem:
        raise DataFileError(
            "the Parquet file cannot be read", where=origin.name, got=str(problem).split("\n")[0][:160], expected="a whole Parquet file",
            do="write it again, or name the file by what it is: " + FORMS,
        ) from None  # fmt: skip
    if not table.num_rows:
        raise EmptyDataError(
            "the file has no rows", where=origin.name, got="0 rows", expected="at least one row", do="give a file with rows"
        )
    return table


def _slow(origin: Origin, text: str, kind: scan.TextKind, on_bad_row: OnBadRow) -> FileRows:
    kept, records, skipped = [], [], 0
    for number, record in enumerate(_checked(origin, text, kind, on_bad_row)):
        if record.problem:
            skipped += 1
        else:
            kept.append(record.values)
            records.append(number)
    names = dict.fromkeys(name for values in kept for name in values)
    return FileRows({name: [values.get(name) for values in kept] for name in names}, np.array(records, dtype=np.int64), skipped)


def _checked(origin: Origin, text: str, kind: scan.TextKind, on_bad_row: OnBadRow) -> Iterator[scan.Record]:
    for record in scan.scan(text, kind):
        if record.problem and on_bad_row == "error":
            raise BadRowError(
                "a row cannot be read", where=f"{origin.name}, line {record.line}", got=record.problem, expected=record.expected,
                do='mend the row, or set on_bad_row = "skip" in [data] to leave such rows out',
            )  # fmt: skip
        yield record


def unknown_suffix(name: str, path: Path) -> DataFileError:
    """The error for a file whose suffix names no format that is read."""
    suffix = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:])
    known = [one for name in names("reader") for one in trait("reader", name, "suffixes")]
    return DataFileError(
        "the data file has a suffix that is not known", where=name, got=suffix or "no suffix", expected=FORMS,
        do=did_you_mean(suffix, known, "convert the file, or rename it if it is one of these already"),
    )  # fmt: skip
