"""Hand a device its part of the base: whole files, each with its SHA-256."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from atoll.base.part import write_part
from atoll.engines.split.cut import Cut
from atoll.wire import protocol_pb2 as pb
from atoll.wire.codec import raw
from atoll.wire.frames import CHUNK_BYTES, Message, Packer


def send_part(source: str, cut: Cut) -> Iterator[bytes]:
    """The frames that carry the files of a device's part of the base.

    Raises: what write_part raises.
    """
    packer = Packer()
    with tempfile.TemporaryDirectory(prefix="atoll-part-") as folder:
        write_part(source, cut.front, cut.back, Path(folder))
        for file in sorted(Path(folder).iterdir()):
            yield from _send_file(file, packer)


def _send_file(file: Path, packer: Packer) -> Iterator[bytes]:
    with file.open("rb") as stream:
        digest, size = hashlib.file_digest(stream, "sha256").hexdigest(), file.stat().st_size
        stream.seek(0)
        offset = 0
        while piece := stream.read(CHUNK_BYTES):
            yield from packer.frames(Message(pb.FilePart(name=file.name, size=size, offset=offset, sha256=digest), (raw(piece),)))
            offset += len(piece)
