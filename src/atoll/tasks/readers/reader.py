"""The seam of data: a reader makes rows of one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np

OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True, slots=True)
class Origin:
    """A file that rows came from, under the name that error messages use."""

    name: str
    path: Path
    reader: str
    """The name of what reads it."""


@dataclass(frozen=True, slots=True, eq=False)
class FileRows:
    """The columns of one file, and which record of the file each row was."""

    columns: Mapping[str, Sequence[object]]
    records: np.ndarray
    num_skipped: int

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, object]], num_skipped: int = 0) -> Self:
        """Of rows by column, one for each record of the file; a row without a column has None there."""
        found = list(rows)
        names = dict.fromkeys(name for row in found for name in row)
        columns = {name: [row.get(name) for row in found] for name in names}
        return cls(columns, np.arange(len(found)), num_skipped)


class Reader(Protocol):
    """A reader. Its class may name `suffixes`, by which its files are found in a folder, and by which "auto" finds it."""

    def read(self, origin: Origin, on_bad_row: OnBadRow) -> FileRows:
        """All rows of one file; those that cannot be used are an error, or are skipped and counted.

        Raises: DataFileError, EmptyDataError, BadRowError.
        """
