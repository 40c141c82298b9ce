"""Where edges' own states wait between rounds (step counts, Adam's moments, watches): on disk, so that memory holds one at a time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, BinaryIO

from atoll.engines.federated.flower import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

_RUN_ID = 1


class EdgeStates(MutableMapping[int, Context]):
    """A Flower context for every node, read from its file when it is asked for and written when it is set.

    The files lie in a folder of the system for temporary ones (TMPDIR), which only this user can open, until `close`.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = dict(names)
        self._folder = tempfile.TemporaryDirectory(prefix="atoll-edges-")

    def close(self) -> None:
        """Delete all states; may be called twice."""
        self._folder.cleanup()

    def __getitem__(self, node: int) -> Context:
        path = self._path(node)
        record = read_record(path) if path.exists() else RecordDict()
        return Context(_RUN_ID, node, {"edge": self._names[node]}, record, {})

    def __setitem__(self, node: int, context: Context) -> None:
        write_record(self._path(node), context.state)

    def __delitem__(self, node: int) -> None:
        del self._names[node]
        self._path(node).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _path(self, node: int) -> Path:
        return Path(self._folder.name) / f"{node}.state"


def write_record(path: Path, record: RecordDict) -> None:
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
    with path.open("wb") as file:
        file.write(json.dumps(parts).encode() + b"\n")
        for array in arrays:
            file.write(array.data)


def read_record(path: Path) -> RecordDict:
    """What `write_record` wrote, bit for bit."""
    record = RecordDict()
    with path.open("rb") as file:
        for name, part in json.loads(file.readline()).items():
            ((kind, fields),) = part.items()
            if kind == "arrays":
                record[name] = _arrays(file, fields)
            else:
                record[name] = MetricRecord(fields) if kind == "metrics" else ConfigRecord(fields)
    return record


def _arrays(file: BinaryIO, fields: Mapping[str, Any]) -> ArrayRecord:
    return ArrayRecord({
        key: Array(dtype, tuple(shape), stype, file.read(num_bytes)) for key, (dtype, shape, stype, num_bytes) in fields.items()
    })  # fmt: skip
