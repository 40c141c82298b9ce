"""Parquet and Arrow files as columns, piece by piece, so that a small file cannot unpack into all memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from atoll.errors import DataFileError, EmptyDataError
from atoll.tasks.readers.reader import ClassNumber, FileRows, OnBadRow, Origin, Unreadable, check_columns, check_size
from atoll.tasks.readers.unpack import whole

if TYPE_CHECKING:
    import pyarrow as pa

# pyarrow is imported where a file is read: batches and the training step do without its memory. No threads of its own are used: one that
# is still busy when the process ends aborts it (https://github.com/apache/arrow/issues/34314).
_BATCH_ROWS = 256


class Parquet:
    """[data] reader = "parquet"."""

    suffixes = (".parquet",)

    def read(self, origin: Origin, on_bad_row: OnBadRow) -> FileRows:
        """All rows of one file.

        Raises: DataFileError, EmptyDataError.
        """
        import pyarrow.parquet

        data = whole(origin)
        return _rows(origin, "Parquet", lambda: _parquet_batches(origin, pyarrow.parquet, data))


class Arrow:
    """[data] reader = "arrow"."""

    suffixes = (".arrow",)

    def read(self, origin: Origin, on_bad_row: OnBadRow) -> FileRows:
        """All rows of one file, as `datasets` writes them (a stream) or as a file with a footer.

        Raises: DataFileError, EmptyDataError.
        """
        import pyarrow as pa

        data = whole(origin)
        return _rows(origin, "Arrow", lambda: _arrow_batches(origin, pa.BufferReader(data)))


def columns_of(batches: Any, origin: Origin) -> dict[str, list[object]]:
    """Columns of record batches, within the limits.

    Raises: DataFileError.
    """
    columns: dict[str, list[object]] = {}
    num_bytes = 0
    for batch in batches:
        num_bytes += _checked_bytes(batch, num_bytes, origin)
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            classes = _class_names(batch.schema, name)
            values = _values(column)
            values = [ClassNumber.of(one, classes) if type(one) is int else one for one in values] if classes else values
            columns.setdefault(name, []).extend(values)
    return columns


def _class_names(schema: Any, name: str) -> tuple[str, ...]:
    """The names of a column's classes, where `datasets` wrote them beside it; none elsewhere."""
    try:
        feature = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][name]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
    except (ValueError, LookupError, TypeError):
        return ()


def _values(column: Any) -> list[object]:
    """The column's values as Python has them, and for one that it cannot have, as a time in the year 300,000, the reason."""
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError):
        return [_value(cell) for cell in column]


def _value(cell: Any) -> object:
    try:
        return cell.as_py()
    except (OverflowError, ValueError) as problem:
        return Unreadable(f"a value that cannot be read: {problem}"[:160])


def _checked_bytes(batch: Any, before: int, origin: Origin) -> int:
    """Bytes of a batch, behind so many before it."""
    check_columns(origin.name, len(batch.schema.names))
    # A cell takes eight bytes as an object, even one that takes nothing in the file.
    num_bytes = max(sum(_plain_bytes(column) for column in batch.columns), 8 * batch.num_rows * len(batch.schema.names))
    check_size(origin.name, before + num_bytes, origin.limits)
    return num_bytes


def _rows(origin: Origin, kind: str, batches: Any) -> FileRows:
    import pyarrow as pa

    try:
        num_bytes = 0
        for batch in batches():  # Once without keeping any, so that it is known what all come to.
            num_bytes += _checked_bytes(batch, num_bytes, origin)
        columns = columns_of(batches(), origin)
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise DataFileError(
            f"the {kind} file cannot be read", where=origin.name, got=str(problem).split("\n")[0][:160], expected=f"a whole {kind} file",
            do="write it again, or name the file by what it is",
        ) from None  # fmt: skip
    length = len(next(iter(columns.values()), ()))
    if not length:
        raise EmptyDataError(
            "the file has no rows", where=origin.name, got="0 rows", expected="at least one row", do="give a file with rows"
        )
    return FileRows(columns, np.arange(length), 0)


def _parquet_batches(origin: Origin, parquet: Any, data: bytes) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    known = parquet.ParquetFile(pa.BufferReader(data))
    _check_names(origin, known.schema_arrow.names)
    paths = [known.schema.column(number).path for number in range(len(known.schema))]
    # A text that is repeated stands once in the file: it is unpacked only when it is known how much it comes to.
    file = parquet.ParquetFile(pa.BufferReader(data), read_dictionary=paths, pre_buffer=False)
    yield from file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)


def _arrow_batches(origin: Origin, source: pa.BufferReader) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(use_threads=False)
    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source, options=options)
        _check_names(origin, file.schema.names)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
        return
    source.seek(0)
    stream = pa.ipc.open_stream(source, options=options)
    _check_names(origin, stream.schema.names)
    yield from stream


def _check_names(origin: Origin, names: list[str]) -> None:
    check_columns(origin.name, len(names))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataFileError(
            "two columns have one name", where=origin.name, got=f"{twice[0]!r} twice", expected="different names",
            do="rename one of the columns",
        )  # fmt: skip


def _plain_bytes(column: Any) -> int:
    """Bytes of a column without its dictionaries, where it has any."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        texts = column.dictionary
        if pa.types.is_string(texts.type) or pa.types.is_binary(texts.type):
            return int(pc.sum(pc.take(pc.binary_length(texts), column.indices)).as_py() or 0)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 8 * len(column) + _plain_bytes(column.flatten())
    elif pa.types.is_map(kind):
        begin, end = column.offsets[0].as_py(), column.offsets[-1].as_py()
        return 8 * len(column) + sum(_plain_bytes(part.slice(begin, end - begin)) for part in (column.keys, column.items))
    elif pa.types.is_struct(kind):
        return sum(_plain_bytes(column.field(number)) for number in range(kind.num_fields))
    return int(column.nbytes)
