"""Rows in: from the demo, a file, a folder of files or a Hugging Face data set, each row knowing where it came from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from atoll.errors import DataFileError, EmptyDataError, PartError
from atoll.registry.parts import make
from atoll.tasks.readers.formats import place
from atoll.tasks.readers.hub import Role, load_hub, load_saved
from atoll.tasks.readers.nearest import few_names
from atoll.tasks.readers.reader import USUAL_LIMITS, FileRows, Limits, OnBadRow, Origin
from atoll.tasks.readers.sources import DataSet, Files, HowToRead, find_source


class RowProblem(Exception):
    """Why one row cannot be used; whoever knows the row's place turns it into an error or skips the row."""

    def __init__(self, got: str, expected: str, column: str = "") -> None:
        super().__init__(got)
        self.got, self.expected, self.column = got, expected, column


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows in order, by column, with the file and record of each."""

    columns: tuple[str, ...]
    values: tuple[Sequence[object], ...]
    origins: tuple[Origin | str, ...]
    """Files, or the id of a data set."""
    origin_of: np.ndarray
    record_of: np.ndarray
    num_skipped: int
    """Rows of the files that could not be read and were left out."""
    on_bad_row: OnBadRow
    notes: tuple[str, ...] = ()
    """What was decided about these rows that their owner should hear."""

    def __len__(self) -> int:
        return len(self.record_of)

    def __getitem__(self, index: int) -> Mapping[str, object]:
        return {name: values[index] for name, values in zip(self.columns, self.values, strict=True)}

    @property
    def name(self) -> str:
        """The first file or data set, for messages about all rows."""
        origin = self.origins[0]
        return origin if isinstance(origin, str) else origin.name

    def column(self, name: str) -> Sequence[object]:
        """All values of one column that is known to exist."""
        return self.values[self.columns.index(name)]

    def where(self, index: int) -> str:
        """The place of a row for people: "notes.csv, line 12". Reads the file again, so call it for errors only."""
        origin, record = self.origins[self.origin_of[index]], int(self.record_of[index])
        return f"{origin}, row {record + 1}" if isinstance(origin, str) else place(origin, record)

    def take(self, indices: Iterable[int]) -> Rows:
        """Some of the rows, in the order given; the count of skipped rows stays with the whole."""
        chosen = np.fromiter(indices, dtype=np.int64)
        values = tuple([column[i] for i in chosen] for column in self.values)
        return Rows(self.columns, values, self.origins, self.origin_of[chosen], self.record_of[chosen], 0, self.on_bad_row)


def load_rows(
    source: str, *, base_dir: Path, limit: int | None, on_bad_row: OnBadRow, reader: str = "auto",
    options: Mapping[str, object] | None = None, limits: Limits = USUAL_LIMITS, role: Role = "train", held_out: Collection[Path] = (),
) -> Rows:  # fmt: skip
    """The rows of `source`: "demo", "demo-eval", a file, a folder (relative to `base_dir`) or data set id, these two with a split.

    `reader` names what reads files, and `options` are its own; "auto": by their suffix. Of a folder and a data set the split that `role`
    asks for is read, unless ":SPLIT" stands behind it, and none of the files of held-out rows.

    Raises: DataFileError, EmptyDataError, BadRowError; PartError where a reader makes something else than rows.
    """
    how = HowToRead(base_dir, on_bad_row, reader, options, limits)
    found = find_source(source, how, role)
    rows = _read(found.without(held_out), how) if isinstance(found, Files) else _of_data_set(source, found, how, role, limit)
    if not len(rows):
        raise EmptyDataError(
            "the data has no usable rows", where=source, got=f"0 rows, {rows.num_skipped} skipped", expected="at least one row",
            do='set on_bad_row = "error" to see what is wrong with them' if rows.num_skipped else "give data with rows",
        )  # fmt: skip
    return rows if limit is None or limit >= len(rows) else _first(rows, limit)


def files_of(source: str, *, base_dir: Path, reader: str, role: Role) -> tuple[Path, ...]:
    """The files that `load_rows` would read; none of a data set that the library reads.

    Raises: DataFileError.
    """
    found = find_source(source, HowToRead(base_dir, reader=reader), role)
    return tuple(origin.path for origin in found.origins) if isinstance(found, Files) else ()


def _first(rows: Rows, limit: int) -> Rows:
    values = tuple(column[:limit] for column in rows.values)
    return replace(rows, values=values, origin_of=rows.origin_of[:limit], record_of=rows.record_of[:limit])


def _read_file(origin: Origin, how: HowToRead) -> FileRows:
    read = make("reader", origin.reader, how.options).read(origin, how.on_bad_row)
    if not isinstance(read, FileRows) or any(len(values) != len(read.records) for values in read.columns.values()):
        raise PartError(
            f"the reader {origin.reader} made something else than rows", where=origin.name, got=type(read).__name__,
            expected="FileRows whose columns are as long as its records", do='see what it returns with atoll.testing.check("reader", ...)',
        )  # fmt: skip
    return read


def _read(files: Files, how: HowToRead) -> Rows:
    parts = [_read_file(origin, how) for origin in files.origins]
    # A file whose rows were all skipped has no columns to compare.
    full = [(origin, part) for origin, part in zip(files.origins, parts, strict=True) if part.columns]
    for origin, part in full[1:]:
        if set(part.columns) != set(full[0][1].columns):
            raise DataFileError(
                "the files of the folder have different columns", where=origin.name, got=few_names(part.columns),
                expected=f"the columns of {full[0][0].name}: {few_names(full[0][1].columns)}",
                do="put files of one kind in a folder, or name one file",
            )  # fmt: skip
    columns = tuple(full[0][1].columns) if full else ()
    values = tuple([value for _, part in full for value in part.columns[name]] for name in columns)
    origin_of = np.repeat(np.arange(len(parts)), [len(part.records) for part in parts])
    record_of = np.concatenate([part.records for part in parts])
    notes = (*files.notes, *(note for part in parts for note in part.notes))
    return Rows(columns, values, files.origins, origin_of, record_of, sum(part.num_skipped for part in parts), how.on_bad_row, notes)


def _of_data_set(source: str, found: DataSet, how: HowToRead, role: Role, limit: int | None) -> Rows:
    origin = Origin(source, how.base_dir, "", how.limits)
    saved = found.saved
    columns = load_hub(source, limit, role, origin) if saved is None else load_saved(saved, found.split, role, limit, origin)
    length = len(next(iter(columns.values()), ()))
    return Rows(tuple(columns), tuple(columns.values()), (source,), np.zeros(length, dtype=np.int64), np.arange(length), 0, how.on_bad_row)
