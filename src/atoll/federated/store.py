"""Where edges' own states wait between rounds (step counts, Adam's moments, module statistics): on disk; memory holds one at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from atoll.errors import RunFolderError
from atoll.federated.flower import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from atoll.scratch import scratch_folder

_RUN_ID = 1


class EdgeStates(MutableMapping[int, Context]):
    """A Flower context for every node, read from its file when it is asked for and written when it is set.

    The files lie in `folder`, which is made anew, or in one of the system's for temporary ones (TMPDIR), until `close`. Only this user can
    open it. A file is only ever replaced as a whole, so that a link to it keeps what it held.
    """

    def __init__(self, names: Mapping[int, str], folder: Path | None = None) -> None:
        self._names = dict(names)
        self._remove: Callable[[], None]
        if folder is None:
            scratch = scratch_folder("atoll-edges-")
            self._folder, self._remove = Path(scratch.name), scratch.cleanup
            return
        refuse_link(folder)
        self._folder, self._remove = folder, partial(shutil.rmtree, folder, ignore_errors=True)
        self._remove()  # Of a process that was killed; what counts is in its checkpoints.
        folder.mkdir(mode=0o700)

    def save(self, folder: Path) -> None:
        """All states as they are now, in a new folder."""
        folder.mkdir(mode=0o700)
        for path in self._folder.glob("*.state"):
            _link(path, folder / path.name)

    def restore(self, folder: Path) -> None:
        """The states that `save` wrote, and no others."""
        for node in self._names:
            self._path(node).unlink(missing_ok=True)
            if (folder / self._path(node).name).exists():
                _link(folder / self._path(node).name, self._path(node))

    def close(self) -> None:
        """Delete all states; may be called twice."""
        self._remove()

    def __getitem__(self, node: int) -> Context:
        path = self._path(node)
        record = read_record(path) if path.exists() else RecordDict()
        return Context(_RUN_ID, node, {"edge": self._names[node]}, record, {})

    def __setitem__(self, node: int, context: Context) -> None:
        path = self._path(node)
        stage = path.with_suffix(".stage")
        write_record(stage, context.state)
        stage.replace(path)

    def __delitem__(self, node: int) -> None:
        del self._names[node]
        self._path(node).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _path(self, node: int) -> Path:
        return self._folder / f"{node}.state"


def refuse_link(path: Path) -> None:
    """See that a folder for states is none that lies elsewhere: what is written to it and deleted from it would be somebody else's.

    Raises: RunFolderError for a symbolic link.
    """
    if path.is_symlink():
        raise RunFolderError(
            "a folder for states is a link to another place", where=str(path), got=f"a link to {path.readlink()}", expected="a folder",
            do="take the link away; to keep states on another disk, put the whole folder there",
        )  # fmt: skip


def _link(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_record(path: Path, record: RecordDict) -> None:
    """A file of a record, as `dump_record` has it."""
    with path.open("wb") as file:
        dump_record(file, record)


def read_record(path: Path) -> RecordDict:
    """What `write_record` wrote, bit for bit."""
    with path.open("rb") as file:
        return load_record(file)


def dump_record(file: BinaryIO, record: RecordDict) -> None:
    """One line of JSON, which says what the records are, and after it the bytes of all arrays."""
    parts: dict[str, object] = {}
    arrays: list[Array] = []
    for name, part in record.items():
        if isinstance(part, ArrayRecord):
            arrays += part.values()
            fields = {key: [array.dtype, list(array.shape), array.stype, len(array.data)] for key, array in part.items()}
            parts[name] = {"arrays": fields}
        else:
            parts[name] = {"metrics" if isinstance(part, MetricRecord) else "config": dict(part)}
    file.write(json.dumps(parts).encode() + b"\n")
    for array in arrays:
        file.write(array.data)


def load_record(file: BinaryIO) -> RecordDict:
    """What `dump_record` wrote, bit for bit.

    Raises: MALFORMED (figures.py) for anything else.
    """
    record, parts = RecordDict(), json.loads(file.readline())
    begin = file.tell()
    left = file.seek(0, os.SEEK_END) - begin
    file.seek(begin)
    for name, part in parts.items():
        ((kind, fields),) = part.items()
        if kind == "arrays":
            # Before anything is read: a length may be any number, and memory is what a reader has.
            if not all(type(size) is int and 0 <= size <= left for *_, size in fields.values()):
                raise ValueError(f"an array of more bytes than the {left} that are there")
            record[name] = _arrays(file, fields)
        else:
            record[name] = MetricRecord(fields) if kind == "metrics" else ConfigRecord(fields)
    return record


def _arrays(file: BinaryIO, fields: Mapping[str, Any]) -> ArrayRecord:
    return ArrayRecord({
        key: Array(dtype, tuple(shape), stype, file.read(num_bytes)) for key, (dtype, shape, stype, num_bytes) in fields.items()
    })  # fmt: skip
