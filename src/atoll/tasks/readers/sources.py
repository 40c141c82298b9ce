"""What a source of run.toml names: files to read, or a data set that `datasets` reads."""

from __future__ import annotations

import filecmp
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from atoll import embedded
from atoll.errors import DataFileError
from atoll.registry.parts import trait
from atoll.tasks.readers.folders import is_saved, split_files
from atoll.tasks.readers.formats import FORMS, reader_of, unknown_suffix
from atoll.tasks.readers.hub import HubSource, Role, looks_like_id
from atoll.tasks.readers.nearest import did_you_mean
from atoll.tasks.readers.reader import USUAL_LIMITS, Limits, OnBadRow, Origin
from atoll.tasks.readers.unpack import unpacked_name

DEMO: Mapping[str, Literal["train", "eval"]] = {"demo": "train", "demo-eval": "eval"}
_OURS = (
    "events.jsonl", "audit.jsonl", "edge.json", "fleet.json", "issued.json", "config.json", "summary.json", "plan.json", "README.md",
    "state", "personal", "traceback.txt",
)  # fmt: skip
"""Files that Atoll itself writes beside rows, and nobody means."""


@dataclass(frozen=True, slots=True)
class HowToRead:
    """What [data] says of all files alike."""

    base_dir: Path
    """Sources are relative to it."""
    on_bad_row: OnBadRow = "error"
    reader: str = "auto"
    """What reads files; "auto": by their suffix."""
    options: Mapping[str, object] | None = None
    """Of the reader."""
    limits: Limits = USUAL_LIMITS


@dataclass(frozen=True, slots=True)
class Files:
    """Files to read one by one, and what is to be told of them."""

    origins: tuple[Origin, ...]
    notes: tuple[str, ...] = ()
    doubtful: tuple[Path, ...] = ()
    """Those of a folder's training rows that are named as if they were held out."""

    def without(self, held_out: Collection[Path]) -> Files:
        """The same without files that hold held-out rows; a source that names just these keeps them, with a word.

        Raises: DataFileError where of a folder nothing is left, or a file that is named as if it were held out.
        """
        left = tuple(origin for origin in self.origins if not any(_is_same(origin.path, path) for path in held_out))
        taken = ", ".join(origin.name for origin in self.origins if origin not in left)
        named = next((origin.name for origin in left if origin.path in self.doubtful), "")
        if named:
            raise DataFileError(
                "a file of the folder is named as if it were held out", where=named, got="training rows in it",
                expected="files that are all trained on, or names as `datasets` knows them: train.csv, test.csv, validation.csv",
                do="rename it in small letters, as test.csv, which is then left out; or name the file to train on alone",
            )  # fmt: skip
        if not taken:
            return self
        if len(self.origins) == 1:
            told = f"{taken} is trained on and scored on: the scores say how well its rows are learned by heart"
            return replace(self, notes=(*self.notes, told))
        if not left:
            raise DataFileError(
                "all files of the folder are held out", where=taken, got="the same files for training and for scores",
                expected="files of its own for each", do="name other files in [data] eval",
            )  # fmt: skip
        return Files(left, (*self.notes, f"not trained on, as it is held out: {taken}"))


@dataclass(frozen=True, slots=True)
class DataSet:
    """What `datasets` reads: a folder that it saved, or (None) a data set by its id."""

    saved: Path | None
    split: str | None = None


def _is_same(path: Path, other: Path) -> bool:
    """Whether two files are one, or a copy of each other."""
    return path.samefile(other) or (path.stat().st_size == other.stat().st_size and filecmp.cmp(path, other, shallow=False))


def find_source(source: str, how: HowToRead, role: Role) -> Files | DataSet:
    """What a source is. Of a folder, the files of the split that is named behind a colon, or that `role` asks for.

    Raises: DataFileError where there is no such file, or nothing that can be read.
    """
    if source in DEMO:
        path = embedded.demo_path(DEMO[source])
        return Files((_origin(source, path, replace(how, reader="auto")),))
    path = how.base_dir / Path(source).expanduser()
    named = _folder_of(source, how.base_dir)
    if named is not None and not source.endswith("]"):
        name, folder, words = named
        if how.reader == "auto" and is_saved(folder):
            return DataSet(folder, words[-1] if words else None)
        return _folder(name, folder, words, how, role)
    if path.exists():
        return Files((_origin(source, path, how),))
    if source.endswith("]") and "[" in source:
        raise DataFileError(
            "a slice of a split is not read", where=source, got=source[source.index("[") :], expected="a whole split",
            do="take the slice off; train_rows and eval_rows in [data] use the first rows, and validation_share holds some out",
        )  # fmt: skip
    if _missing_file(source, path, how.base_dir):
        raise _no_such_file(source, path)
    return DataSet(None)


def local_path(source: str, base_dir: Path) -> Path | None:
    """The file or folder that a source names, there or not; None for the demo and for a data set id."""
    if source in DEMO:
        return None
    path, folder = base_dir / Path(source).expanduser(), _folder_of(source, base_dir)
    if folder is not None:
        return folder[1]
    return path if path.exists() or _missing_file(source, path, base_dir) else None


def _folder_of(source: str, base_dir: Path) -> tuple[str, Path, tuple[str, ...]] | None:
    """The folder that a source names, and the words behind it: a split, a config, or both."""
    for parts in (source.rsplit(":", number) for number in range(3)):
        if parts[0] and (path := base_dir / Path(parts[0]).expanduser()).is_dir():
            return parts[0].rstrip("/"), path, tuple(parts[1:])
    return None


def _origin(name: str, path: Path, how: HowToRead) -> Origin:
    found = reader_of(path) if how.reader == "auto" else how.reader
    if found is None:
        raise unknown_suffix(name, path)
    return Origin(name, path, found, how.limits)


def _folder(name: str, path: Path, words: tuple[str, ...], how: HowToRead, role: Role) -> Files:
    suffixes = () if how.reader == "auto" else tuple(trait("reader", how.reader, "suffixes"))

    def is_data(file: Path) -> bool:
        if how.reader == "auto":
            return reader_of(file) is not None
        return not suffixes or file.name.lower().endswith(suffixes) or unpacked_name(file).endswith(suffixes)

    found = split_files(name, path, words, role, is_data)
    origins = (_origin(f"{name}/{file.relative_to(path).as_posix()}", file, how) for file in found.files)
    return Files(tuple(origins), found.notes, found.doubtful)


def _missing_file(source: str, path: Path, base_dir: Path) -> bool:
    """Whether a source that does not exist was meant as a file rather than as a data set id."""
    name = Path(HubSource.of(source).name)
    in_known_folder = "/" in source and path.parent.is_dir() and path.parent != base_dir
    has_suffix = "/" not in source and bool(name.suffix)
    return reader_of(name) is not None or has_suffix or in_known_folder or not looks_like_id(source)


def _no_such_file(source: str, path: Path) -> DataFileError:
    folder = path.parent
    beside = [file.name for file in folder.iterdir() if file.name not in _OURS] if folder.is_dir() else []
    otherwise = "check the path; it is relative to run.toml" if folder.is_dir() else f"there is no folder {Path(source).parent} either"
    return DataFileError(
        "there is no such data file", where=source,
        got=f"nothing of this name in {folder.resolve()}" if folder.is_dir() else "nothing there",
        expected=f"{FORMS}, a folder of them, or a Hugging Face data set id", do=did_you_mean(path.name, beside, otherwise),
    )  # fmt: skip
