"""The seam of data: a reader makes rows of one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np

from atoll.errors import DataFileError

OnBadRow = Literal["error", "skip"]
MOST_COLUMNS = 10_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may come to: a small one can hold gigabytes once it is unpacked."""

    file_bytes: int = 2 * 10**9
    """Of a file as it is once unpacked ([data] largest_file)."""
    row_bytes: int = 16 * 10**6
    """Of one row; a larger one is a bad row ([data] largest_row)."""


USUAL_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In the place of a value that is no value here, and matters only where its column is used: why."""

    why: str


class ClassNumber(int):
    """A number that stands for a class by name (ClassLabel of `datasets`): a number where it is written, its name as a class."""

    names: Sequence[str]

    @classmethod
    def of(cls, number: int, names: Sequence[str]) -> Self:
        """One with the names of all classes."""
        made = cls(number)
        made.names = names
        return made

    @property
    def label(self) -> str | None:
        """Its name; None for -1, by which `datasets` says that there is no class."""
        return self.names[self] if 0 <= self < len(self.names) else None if self == -1 else str(int(self))


@dataclass(frozen=True, slots=True)
class Origin:
    """A file that rows came from, under the name that error messages use."""

    name: str
    path: Path
    reader: str
    """The name of what reads it."""
    limits: Limits = USUAL_LIMITS


@dataclass(frozen=True, slots=True, eq=False)
class FileRows:
    """The columns of one file, and which record of the file each row was."""

    columns: Mapping[str, Sequence[object]]
    records: np.ndarray
    num_skipped: int
    notes: tuple[str, ...] = ()
    """What was decided about the file that its owner should hear."""

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, object]], num_skipped: int = 0) -> Self:
        """Of rows by column, one for each record of the file; a row without a column has None there."""
        columns = GrowingColumns("rows", USUAL_LIMITS)
        for row in rows:
            columns.add(row)
        return cls(columns.values, np.arange(columns.num_rows), num_skipped)


class Reader(Protocol):
    """A reader. Its class may name `suffixes`, by which its files are found in a folder, and by which "auto" finds it."""

    def read(self, origin: Origin, on_bad_row: OnBadRow) -> FileRows:
        """All rows of one file; those that cannot be used are an error, or are skipped and counted.

        Raises: DataFileError, EmptyDataError, BadRowError.
        """


class GrowingColumns:
    """Rows put into columns one by one; what a row does not have is None."""

    def __init__(self, name: str, limits: Limits) -> None:
        self._name, self._limits = name, limits
        self.values: dict[str, list[object]] = {}
        self.num_rows = 0

    def add(self, row: Mapping[str, object]) -> None:
        """One more row.

        Raises: DataFileError where rows that each bring columns of their own would fill the memory.
        """
        for name, value in row.items():
            column = self.values.get(name)
            if column is None:
                check_columns(self._name, len(self.values) + 1)
                column = self.values[name] = [None] * self.num_rows
            column.append(value)
        self.num_rows += 1
        if len(row) < len(self.values):
            check_size(self._name, 8 * self.num_rows * len(self.values), self._limits)
            for column in self.values.values():
                if len(column) < self.num_rows:
                    column.append(None)


def check_columns(name: str, number: int) -> None:
    """Whether rows have so few columns that each can be given as an object.

    Raises: DataFileError.
    """
    if number > MOST_COLUMNS:
        raise DataFileError(
            "the data file has too many columns", where=name, got=f"at least {number}", expected=f"at most {MOST_COLUMNS:,} columns",
            do="keep the columns that are used; if each row has keys of its own, put them into one column",
        )  # fmt: skip


def check_size(name: str, num_bytes: int, limits: Limits) -> None:
    """Whether a file is within its limit as far as it is read.

    Raises: DataFileError.
    """
    if num_bytes > limits.file_bytes:
        raise DataFileError(
            "the data file is larger than allowed", where=name, got=f"more than {limits.file_bytes:,} bytes once unpacked",
            expected="at most [data] largest_file", do="split the file, or allow more: largest_file = \"10 GB\" below [data]",
        )  # fmt: skip
