"""One message between a coordinator and an edge, as bytes for a local socket or a file."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace

from atoll.errors import ProtocolError
from atoll.federated.flower import Array, ArrayRecord, RecordDict
from atoll.federated.store import dump_record, load_record

PROBLEM = "problem"
"""Key of what an edge says went wrong, in a reply: Flower's own errors are for what happened on the way."""
_PACK = "atoll.records"
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError)
"""What reading records raises where something else lies there."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A message to a node, or its answer."""

    number: int
    """The coordinator's own; the answer to a message has its number."""
    node: int
    kind: str
    """Flower's message type."""
    group: str
    content: RecordDict
    problem: str | None = None
    """Of an answer: what went wrong; there is no content then."""
    is_lost: bool = False
    """Whether it went wrong on the way, and not where the message was to be answered."""

    def to_bytes(self) -> bytes:
        """A line of JSON, and the content after it."""
        head = {
            "number": self.number, "node": self.node, "kind": self.kind, "group": self.group, "problem": self.problem, "lost": self.is_lost,
        }  # fmt: skip
        file = io.BytesIO()
        file.write(json.dumps(head).encode() + b"\n")
        dump_record(file, self.content)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Frame:
        """What `to_bytes` made.

        Raises: ProtocolError for other bytes.
        """
        file = io.BytesIO(data)
        try:
            head = json.loads(file.readline())
            return cls(head["number"], head["node"], head["kind"], head["group"], load_record(file), head["problem"], head["lost"])
        except _DAMAGE as problem:
            raise _foreign(f"{type(problem).__name__}: {problem}") from None

    def answered(self, content: RecordDict | None = None, problem: str | None = None, *, is_lost: bool = False) -> Frame:
        """The answer to this message, or why there is none."""
        return replace(self, content=RecordDict() if content is None else content, problem=problem, is_lost=is_lost)


def packed(content: RecordDict) -> RecordDict:
    """All records in one array: Flower carries every array on its own, with several requests for each."""
    file = io.BytesIO()
    dump_record(file, content)
    data = file.getvalue()
    return RecordDict({_PACK: ArrayRecord({_PACK: Array("uint8", (len(data),), _PACK, data)})})


def unpacked(record: RecordDict) -> RecordDict:
    """What `packed` was given.

    Raises: ProtocolError for any other record.
    """
    if _PACK not in record.array_records:
        raise _foreign(", ".join(record) or "an empty message")
    try:
        return load_record(io.BytesIO(record.array_records[_PACK][_PACK].data))
    except _DAMAGE as problem:
        raise _foreign(f"{type(problem).__name__}: {problem}") from None


def _foreign(got: str) -> ProtocolError:
    return ProtocolError("a message that Atoll did not write", got=got, expected=_PACK, do="run the same version of Atoll everywhere")
