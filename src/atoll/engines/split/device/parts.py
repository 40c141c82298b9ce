"""Fetch this device's part of the base from the host: whole files, each checked by its SHA-256."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import grpc

from atoll.engines.split.cut import Cut
from atoll.engines.split.transport import SERVICE, lost_call
from atoll.errors import FrameError, OutputError
from atoll.wire import protocol_pb2 as pb
from atoll.wire.frames import CHUNK_BYTES, Assembler, Message
from atoll.wire.handshake import PROTOCOL

LARGEST_PIECE_BYTES = 2 * CHUNK_BYTES
_PLAIN_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def fetch_part(channel: grpc.Channel, cut: Cut, folder: Path) -> None:
    """Fetch the device's part of the host's base into `folder`, whole or not at all.

    Raises: HostLostError, FrameError for files that are not what the host said, OutputError where the folder cannot be written.
    """
    request = pb.PartRequest(protocol=PROTOCOL, cut_front=cut.front, cut_back=cut.back).SerializeToString()
    part: Any = channel.unary_stream(f"/{SERVICE}/Part")
    assembler = Assembler(LARGEST_PIECE_BYTES)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as problem:
        raise OutputError("the base cannot be kept there", where=str(folder), got=str(problem), do="choose another folder") from None
    try:
        expected: dict[str, str] = {}
        for frame in part(request):
            message = assembler.add(frame)
            if message is not None:
                _keep(message, staging, expected)
        for name, digest in expected.items():
            _check(staging / name, digest)
        staging.rename(folder)
    except grpc.RpcError as problem:
        raise lost_call(problem.code(), problem.details()) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _keep(message: Message, staging: Path, expected: dict[str, str]) -> None:
    part = message.body
    if message.kind != "file_part" or not part.name or part.name.startswith(".") or not _PLAIN_NAME.issuperset(part.name):
        raise FrameError("a file of the base has a name that is not allowed", got=repr(getattr(part, "name", message.kind)))
    expected[part.name] = part.sha256
    with (staging / part.name).open("ab") as stream:
        if stream.tell() != part.offset:
            raise FrameError("a piece of a file is missing", where=part.name, got=f"offset {part.offset}", expected=str(stream.tell()))
        stream.write(message.tensors[0].data)


def _check(file: Path, digest: str) -> None:
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != digest:
        raise FrameError("a file of the base is damaged", where=file.name, got=got, expected=digest, do="fetch it again")
