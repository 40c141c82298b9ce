"""Hand devices their part of the base: whole files, each with its SHA-256."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from atoll.base.part import write_part
from atoll.errors import AtollError, ProtocolError
from atoll.split.cut import Cut
from atoll.split.transport import Alarm
from atoll.wire import protocol_pb2 as pb
from atoll.wire.codec import raw
from atoll.wire.frames import CHUNK_BYTES, Message, Packer
from atoll.wire.handshake import PROTOCOL

AT_ONCE = 4
"""Calls at once: each keeps a thread, and a copy of the part on disk."""
STALL_SECONDS = 60.0
"""How long a device may leave a frame where it is."""
log = logging.getLogger(__name__)


class Parts:
    """Answers the Part calls of a host whose base is `source`."""

    def __init__(self, source: str) -> None:
        self._source, self._room = source, threading.BoundedSemaphore(AT_ONCE)

    def serve(self, request: Any, context: Any) -> Iterator[bytes]:
        """The answer to one pb.PartRequest."""
        if not self._room.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{AT_ONCE} devices fetch their part of the base already")
        alarm = Alarm(context.cancel)
        try:
            _check_protocol(request.protocol)
            for frame in send_part(self._source, Cut(request.cut_front, request.cut_back)):
                # gRPC goes on only when the frame is under way: without an alarm a device that does not read would keep this thread.
                with alarm.within(STALL_SECONDS):
                    yield frame
        except AtollError as problem:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem.page())
        finally:
            alarm.close()
            self._room.release()


def send_part(source: str, cut: Cut) -> Iterator[bytes]:
    """The frames that carry the files of a device's part of the base; a refusal where this machine's disk does not let it.

    Raises: what write_part raises, but for OSError.
    """
    packer = Packer()
    try:
        with tempfile.TemporaryDirectory(prefix="atoll-part-") as folder:
            write_part(source, cut.front, cut.back, Path(folder))
            for file in sorted(Path(folder).iterdir()):
                yield from _send_file(file, packer)
    except OSError as problem:
        log.exception("a device's part of the base cannot be sent")
        # Without the folder, which is nobody's business elsewhere.
        yield from packer.frames(Message(pb.Refusal(
            code="failed", field="part of the base", host_value="a copy of the part among the host's temporary files",
            device_value=problem.strerror or type(problem).__name__,
            do="look into the host's log; where its disk is full, make room or give it another TMPDIR",
        )))  # fmt: skip


def _send_file(file: Path, packer: Packer) -> Iterator[bytes]:
    with file.open("rb") as stream:
        digest, size = hashlib.file_digest(stream, "sha256").hexdigest(), file.stat().st_size
        stream.seek(0)
        # At least one piece: an empty file is told of by an empty one.
        for offset in range(0, max(size, 1), CHUNK_BYTES):
            part = pb.FilePart(name=file.name, size=size, offset=offset, sha256=digest)
            yield from packer.frames(Message(part, (raw(stream.read(CHUNK_BYTES)),)))


def _check_protocol(protocol: int) -> None:
    if protocol != PROTOCOL:
        raise ProtocolError(
            "device and host speak different versions of the split protocol", where="protocol", got=str(protocol), expected=str(PROTOCOL),
            do="install the same version of Atoll on both sides",
        )  # fmt: skip
