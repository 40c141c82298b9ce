"""One message between a coordinator and an edge, as bytes for a local socket or a file."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace

from atoll.errors import ProtocolError
from atoll.federated.figures import MALFORMED, said, shown
from atoll.federated.flower import Array, ArrayRecord, RecordDict
from atoll.federated.store import dump_record, load_record
from atoll.printable import printable
from atoll.units import counted

PROBLEM = "problem"
"""Key of what an edge says went wrong, in a reply: Flower's own errors are for what happened on the way."""
ANSWER_BYTES = 4 * 2**20
"""An answer may be so much longer than its question: an adapter comes back as large as it went, and figures and names beside it."""
_PACK = "atoll.records"
_PAGE_LINES, _LINE_SIGNS = 40, 1000
"""Of what an edge says went wrong."""


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
    most_bytes: int | None = None
    """How long the answer to a message may be, packed; None: as long as it likes."""

    def to_bytes(self) -> bytes:
        """A line of JSON, and the content after it."""
        head = {
            "number": self.number, "node": self.node, "kind": self.kind, "group": self.group, "problem": self.problem, "lost": self.is_lost,
            "most_bytes": self.most_bytes,
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
            return cls(
                head["number"], head["node"], head["kind"], head["group"], load_record(file), head["problem"], head["lost"],
                head["most_bytes"],
            )  # fmt: skip
        except MALFORMED as problem:
            raise _foreign(said(problem)) from None

    def answered(self, content: RecordDict | None = None, problem: str | None = None, *, is_lost: bool = False) -> Frame:
        """The answer to this message, or why there is none."""
        return replace(self, content=RecordDict() if content is None else content, problem=problem, is_lost=is_lost)


def packed(content: RecordDict) -> RecordDict:
    """All records in one array: Flower carries every array on its own, with several requests for each."""
    file = io.BytesIO()
    dump_record(file, content)
    data = file.getvalue()
    return RecordDict({_PACK: ArrayRecord({_PACK: Array("uint8", (len(data),), _PACK, data)})})


def unpacked(record: RecordDict, most_bytes: int | None = None) -> RecordDict:
    """What `packed` was given.

    Raises: ProtocolError for any other record, and for one of more than `most_bytes`, of which nothing is read.
    """
    if list(record) != [_PACK] or list(record[_PACK]) != [_PACK] or not isinstance(record[_PACK], ArrayRecord):
        raise _foreign(shown(list(record)) if record else "an empty message")
    data = record.array_records[_PACK][_PACK].data
    if most_bytes is not None and len(data) > most_bytes:
        raise ProtocolError(
            "a message is longer than it may be", got=counted(len(data), "byte"), expected=f"at most {most_bytes}",
            do="run the same version of Atoll everywhere; leave the edge out if it cannot be trusted",
        )  # fmt: skip
    try:
        return load_record(io.BytesIO(data))
    except MALFORMED as problem:
        raise _foreign(said(problem)) from None


def page_of(text: str) -> str:
    """A page that an edge wrote, for a terminal and a log: its signs are printable, and no later line begins where a first one does."""
    first, *rest = text.splitlines()[:_PAGE_LINES] or [""]
    lines = [first, *(line if line.startswith("  ") else f"  {line}" for line in rest)]
    return "\n".join(printable(line)[:_LINE_SIGNS] for line in lines)


def _foreign(got: str) -> ProtocolError:
    return ProtocolError("a message that Atoll did not write", got=got, expected=_PACK, do="run the same version of Atoll everywhere")


def digest_of(content: RecordDict) -> str:
    """Of a question, whatever order transport has given its records."""
    hasher = hashlib.sha256()
    for name, record in sorted(content.items()):
        hasher.update(f"\n{name}\n".encode())
        if not isinstance(record, ArrayRecord):
            hasher.update(json.dumps(dict(record), sort_keys=True).encode())
            continue
        for key, array in sorted(record.items()):
            hasher.update(f"\n{key} {array.dtype} {array.shape}\n".encode())
            hasher.update(array.data)
    return hasher.hexdigest()


def folder_name(name: str) -> str:
    """A name from another machine as that of a folder."""
    return hashlib.sha256(name.encode()).hexdigest()[:16] if not name.replace("-", "").isalnum() else name
