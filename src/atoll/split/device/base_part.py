"""Fetch this device's part of the base from the host: whole files, each checked by its SHA-256, and nothing that was not asked for."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc

from atoll.base.headers import CONFIG, PART, WEIGHTS
from atoll.base.part import BESIDE_WEIGHTS
from atoll.errors import FrameError, OutputError
from atoll.split.cut import Cut
from atoll.split.transport import SERVICE, Alarm, lost, lost_call
from atoll.wire import protocol_pb2 as pb
from atoll.wire.frames import CHUNK_BYTES, Assembler, Message
from atoll.wire.handshake import PROTOCOL, refusal_error

LARGEST_PIECE_BYTES = 2 * CHUNK_BYTES
SILENCE_SECONDS = 60.0
"""How long a host may take for a frame; for the first one it reads the base and copies the part."""
_NEEDED = (CONFIG, WEIGHTS, PART)
_NAMES = frozenset((*BESIDE_WEIGHTS, *_NEEDED))


def fetch_part(channel: grpc.Channel, cut: Cut, folder: Path) -> None:
    """Fetch the device's part of the host's base into `folder`, whole or not at all.

    Raises: HostLostError; HostRefusedError where the host cannot send it; FrameError for files that are not what the host said or may not
        be here; OutputError where the folder cannot be written.
    """
    try:
        with _staging(folder) as staging:
            _receive(channel, cut, staging)
            staging.rename(folder)
    except OSError as problem:
        raise OutputError(
            "the base cannot be kept there", where=str(folder), got=str(problem), expected="room, and nothing of that name",
            do="choose another folder",
        ) from None  # fmt: skip


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """An empty folder on the disk of `folder`, to be renamed; where that does not come about nothing is left, the parents neither."""
    new = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as outer:
            staging = Path(outer) / "part"
            staging.mkdir()
            yield staging
    except BaseException:
        for parent in new:
            with suppress(OSError):  # Somebody else has put something there.
                parent.rmdir()
        raise


def _receive(channel: grpc.Channel, cut: Cut, folder: Path) -> None:
    assembler, files = Assembler(LARGEST_PIECE_BYTES), _Files(folder)
    part: Any = channel.unary_stream(f"/{SERVICE}/Part")
    call = part(pb.PartRequest(protocol=PROTOCOL, cut_front=cut.front, cut_back=cut.back).SerializeToString())
    alarm = Alarm(call.cancel)
    try:
        for frame in _frames(call, alarm):
            message = assembler.add(frame)
            if message is not None and message.kind == "refusal":
                raise refusal_error(message.body, "the host's part of the base")
            if message is not None:
                files.keep(message)
        if assembler.inside:
            _refuse("the last message is cut off")
        files.check()
    finally:
        alarm.close()
        call.cancel()  # Of a host that was refused nothing more is taken.


def _frames(call: Any, alarm: Alarm) -> Iterator[bytes]:
    try:
        while True:
            with alarm.within(SILENCE_SECONDS):
                frame = next(call, None)
            if frame is None:
                return
            yield frame
    except grpc.RpcError as problem:
        raise (lost(f"silence for {SILENCE_SECONDS:g} s") if alarm.rang else lost_call(problem.code(), problem.details())) from None


@dataclass(slots=True, eq=False)
class _File:
    """What the host said of a file, and what has arrived of it."""

    size_bytes: int
    sha256: str
    arrived_bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class _Files:
    """Files as they arrive in a folder. The host is held to what it said first, and to the free disk."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._free_bytes = folder, shutil.disk_usage(folder).free
        self._files: dict[str, _File] = {}

    def keep(self, message: Message) -> None:
        """Write one piece of a file.

        Raises: FrameError, OSError.
        """
        part = message.body
        if message.kind != "file_part" or part.name not in _NAMES:
            _refuse("a file that does not belong to a base", got=ascii(part.name)[:80] if message.kind == "file_part" else message.kind)
        codecs = [tensor.codec for tensor in message.tensors]
        if codecs != ["raw"]:
            _refuse("a piece of a file comes as one run of plain bytes", part.name, got=", ".join(codecs[:4]) or "none", expected="raw")
        data, is_first = message.tensors[0].data, part.name not in self._files
        file = self._begin(part) if is_first else self._files[part.name]
        if (part.size, part.sha256) != (file.size_bytes, file.sha256):
            _refuse("a file has two sizes or digests", part.name, got=f"{part.size} bytes", expected=f"{file.size_bytes} bytes, as before")
        if part.offset != file.arrived_bytes:
            _refuse("a piece of a file is missing", part.name, got=f"offset {part.offset}", expected=str(file.arrived_bytes))
        if part.offset + len(data) > file.size_bytes:
            _refuse("a file is larger than announced", part.name, got=f"{part.offset + len(data)} bytes", expected=str(file.size_bytes))
        if not data and not (is_first and file.size_bytes == 0):
            _refuse("an empty piece of a file", part.name)  # It could be followed by others for ever.
        with (self._folder / part.name).open("ab") as stream:
            stream.write(data)
        file.digest.update(data)
        file.arrived_bytes += len(data)

    def check(self) -> None:
        """Look whether all has arrived.

        Raises: FrameError.
        """
        missing = [name for name in _NEEDED if name not in self._files]
        if missing:
            _refuse("a file of the base is missing", missing[0], got=", ".join(self._files) or "no files")
        for name, file in self._files.items():
            if file.arrived_bytes != file.size_bytes:
                _refuse("a file of the base is cut off", name, got=f"{file.arrived_bytes} bytes", expected=f"{file.size_bytes} bytes")
            if file.digest.hexdigest() != file.sha256:
                _refuse("a file of the base is damaged", name, got=file.digest.hexdigest(), expected=ascii(file.sha256)[:80])

    def _begin(self, part: pb.FilePart) -> _File:
        """A file that is heard of for the first time."""
        total_bytes = part.size + sum(file.size_bytes for file in self._files.values())
        if total_bytes > self._free_bytes:
            _refuse("the host's files are larger than the free disk", part.name, got=f"{total_bytes} bytes",
                    expected=f"at most {self._free_bytes} bytes", do="choose a folder with more room, or check the host")  # fmt: skip
        self._files[part.name] = _File(part.size, part.sha256)
        return self._files[part.name]


def _refuse(what: str, where: str = "the host's part of the base", *, got: str = "", expected: str = "",
            do: str = "fetch it again; if it stays so, do not trust this host") -> NoReturn:  # fmt: skip
    raise FrameError(what, where=where, got=got, expected=expected, do=do)
