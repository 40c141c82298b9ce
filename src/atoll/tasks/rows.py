"""Rows in: from the demo, a file, a folder of files or a Hugging Face data set, each row knowing where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from atoll import embedded
from atoll.errors import DataFileError, EmptyDataError, PartError
from atoll.registry.parts import make, trait
from atoll.tasks.readers.formats import FORMS, place, reader_of, unknown_suffix
from atoll.tasks.readers.hub import load_hub, looks_like_id
from atoll.tasks.readers.nearest import did_you_mean
from atoll.tasks.readers.reader import FileRows, OnBadRow, Origin

DEMO: Mapping[str, Literal["train", "eval"]] = {"demo": "train", "demo-eval": "eval"}


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
    options: Mapping[str, object] | None = None,
) -> Rows:  # fmt: skip
    """The rows of `source`: "demo", "demo-eval", a file or folder (relative to `base_dir`), or a data set id with an optional ":split".

    `reader` names what reads files, and `options` are its own; "auto": by their suffix.

    Raises: DataFileError, EmptyDataError, BadRowError; PartError where a reader makes something else than rows.
    """
    reader = "auto" if source in DEMO else reader
    path = embedded.demo_path(DEMO[source]) if source in DEMO else base_dir / Path(source).expanduser()
    if path.is_dir():
        rows = _read(_folder(source, path, reader), on_bad_row, options)
    elif path.exists():
        rows = _read([_origin(source, path, reader)], on_bad_row, options)
    elif _missing_file(source, path, base_dir):
        raise _no_such_file(source, path)
    else:
        rows = _hub_rows(source, limit, on_bad_row)
    if not len(rows):
        raise EmptyDataError(
            "the data has no usable rows", where=source, got=f"0 rows, {rows.num_skipped} skipped", expected="at least one row",
            do='set on_bad_row = "error" to see what is wrong with them' if rows.num_skipped else "give data with rows",
        )  # fmt: skip
    return rows if limit is None or limit >= len(rows) else _first(rows, limit)


def names_file(source: str, base_dir: Path) -> bool:
    """Whether `source` is a file or a folder, there or not, and neither the demo nor a data set id."""
    path = base_dir / Path(source).expanduser()
    return source not in DEMO and (path.exists() or _missing_file(source, path, base_dir))


def _first(rows: Rows, limit: int) -> Rows:
    values = tuple(column[:limit] for column in rows.values)
    return Rows(rows.columns, values, rows.origins, rows.origin_of[:limit], rows.record_of[:limit], rows.num_skipped, rows.on_bad_row)


def _origin(name: str, path: Path, reader: str) -> Origin:
    found = reader_of(path) if reader == "auto" else reader
    if found is None:
        raise unknown_suffix(name, path)
    return Origin(name, path, found)


def _folder(source: str, path: Path, reader: str) -> list[Origin]:
    suffixes = () if reader == "auto" else trait("reader", reader, "suffixes")

    def is_data(file: Path) -> bool:
        return reader_of(file) is not None if reader == "auto" else not suffixes or file.name.lower().endswith(tuple(suffixes))

    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_")) and is_data(file))
    if files:
        return [_origin(f"{source.rstrip('/')}/{file.name}", file, reader) for file in files]
    inside = ", ".join(sorted(file.name for file in path.iterdir())[:6]) or "nothing"
    raise DataFileError(
        "the folder holds no data files", where=source, got=f"a folder holding {inside}",
        expected=f"files called {' '.join(suffixes) or FORMS}", do="name the folder that holds the files themselves",
    )  # fmt: skip


def _read_file(origin: Origin, on_bad_row: OnBadRow, options: Mapping[str, object] | None) -> FileRows:
    read = make("reader", origin.reader, options).read(origin, on_bad_row)
    if not isinstance(read, FileRows) or any(len(values) != len(read.records) for values in read.columns.values()):
        raise PartError(
            f"the reader {origin.reader} made something else than rows", where=origin.name, got=type(read).__name__,
            expected="FileRows whose columns are as long as its records", do='see what it returns with atoll.testing.check("reader", ...)',
        )  # fmt: skip
    return read


def _read(origins: Sequence[Origin], on_bad_row: OnBadRow, options: Mapping[str, object] | None) -> Rows:
    parts = [_read_file(origin, on_bad_row, options) for origin in origins]
    # A file whose rows were all skipped has no columns to compare.
    full = [(origin, part) for origin, part in zip(origins, parts, strict=True) if part.columns]
    for origin, part in full[1:]:
        if set(part.columns) != set(full[0][1].columns):
            raise DataFileError(
                "the files of the folder have different columns", where=origin.name, got=", ".join(part.columns),
                expected=f"the columns of {full[0][0].name}: {', '.join(full[0][1].columns)}",
                do="put files of one kind in a folder, or name one file",
            )  # fmt: skip
    columns = tuple(full[0][1].columns) if full else ()
    values = tuple([value for _, part in full for value in part.columns[name]] for name in columns)
    origin_of = np.repeat(np.arange(len(parts)), [len(part.records) for part in parts])
    record_of = np.concatenate([part.records for part in parts])
    return Rows(columns, values, tuple(origins), origin_of, record_of, sum(part.num_skipped for part in parts), on_bad_row)


def _hub_rows(source: str, limit: int | None, on_bad_row: OnBadRow) -> Rows:
    columns = load_hub(source, limit)
    length = len(next(iter(columns.values()), ()))
    return Rows(tuple(columns), tuple(columns.values()), (source,), np.zeros(length, dtype=np.int64), np.arange(length), 0, on_bad_row)


def _missing_file(source: str, path: Path, base_dir: Path) -> bool:
    """Whether a source that does not exist was meant as a file rather than as a data set id."""
    in_known_folder = "/" in source and path.parent.is_dir() and path.parent != base_dir
    has_suffix = "/" not in source and bool(path.suffix)
    return reader_of(path) is not None or has_suffix or in_known_folder or not looks_like_id(source)


def _no_such_file(source: str, path: Path) -> DataFileError:
    folder = path.parent
    beside = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    otherwise = "check the path; it is relative to run.toml" if folder.is_dir() else f"there is no folder {Path(source).parent} either"
    return DataFileError(
        "there is no such data file", where=source, got="nothing there",
        expected=f"{FORMS}, a folder of them, or a Hugging Face data set id", do=did_you_mean(path.name, beside, otherwise),
    )  # fmt: skip
