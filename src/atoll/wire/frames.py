"""Messages as frames and back. A message's bytes: u32 header length, the header, the bytes of all tensors; a frame carries one chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn

import torch
from google.protobuf.message import DecodeError
from xxhash import xxh3_64

from atoll.errors import FrameError
from atoll.wire import protocol_pb2 as pb
from atoll.wire.byte_formulas import encoded_bytes
from atoll.wire.encoding import Encoded

Kind = Literal[
    "hello", "welcome", "refusal", "forward", "input", "output", "hidden", "hidden_gradient", "gradient", "input_gradient", "finished",
    "bye", "file_part", "killed", "wait",
]  # fmt: skip

CHUNK_BYTES: Final = 2**20
MAX_HEADER_BYTES: Final = 2**20
MAX_TENSORS: Final = 4096
"""In one message: more than three for each projection of any base."""
MAX_DIMENSIONS: Final = 3
MAX_DIMENSION: Final = 2**31 - 1

_LENGTH_BYTES = 4
_LARGE_BYTES = 2**16
_KINDS: dict[type, Kind] = {getattr(pb, f.message_type.name): f.name for f in pb.Message.DESCRIPTOR.oneofs_by_name["body"].fields}
_MESSAGE, _INDEX, _TOTAL, _LENGTH, _PAYLOAD = 0x08, 0x10, 0x18, 0x20, 0x32
_CHECKSUM = 0x29
"""Tags of Frame's fields: number * 8 + wire type (0 varint, 1 fixed64, 2 bytes)."""


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message of the dialogue: a body of protocol_pb2 (Hello, Forward, ...) and its tensors."""

    body: Any
    tensors: tuple[Encoded, ...] = ()

    @property
    def kind(self) -> Kind:
        """Which body it has, as the dialogue names it: "hidden_gradient" for HiddenGradient."""
        return _KINDS[type(self.body)]


@dataclass(slots=True, eq=False)
class Packer:
    """Makes the frames of one direction of a stream."""

    chunk_bytes: int = CHUNK_BYTES
    """Largest payload of a frame."""
    num_messages: int = field(default=0, init=False)
    """Made so far; also the number of the next one."""

    def frames(self, message: Message) -> Iterator[bytes]:
        """The message as serialized frames, each made when it is asked for; use them up before the next message.

        Raises: FrameError where it has too many tensors or too long a header, or a tensor's bytes are not those of its shape.
        """
        pieces = _pieces(message)
        number, self.num_messages = self.num_messages, self.num_messages + 1
        return _chunks(pieces, number, self.chunk_bytes)


class Assembler:
    """Puts messages together from the frames of one direction. Holds no more than what has arrived, and no more than the limit."""

    def __init__(self, max_message_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self.num_messages = 0
        """Complete ones so far; also the number of the next one."""
        self._broken = False
        self._begin()

    @property
    def inside(self) -> bool:
        """Whether a message has begun and not ended: a stream that ends now was cut off."""
        return self._next_index > 0

    def add(self, frame: bytes) -> Message | None:
        """Take the next frame; the message, if this was its last one.

        Raises: FrameError for a frame that is damaged, missing, out of order or too large, an unknown kind of message, and tensors that
            do not add up. What comes after it on this stream is refused too.
        """
        if self._broken:
            _refuse("a frame after a damaged one", do="connect again")
        try:
            return self._add(frame)
        except BaseException:
            self._broken = True
            self._begin()
            raise

    def _begin(self) -> None:
        self._next_index, self._total, self._length = 0, 0, 0
        self._head, self._head_bytes = bytearray(), _LENGTH_BYTES
        self._body: list[memoryview | bytearray] = []
        self._arrived = 0
        self._kind_and_tensors: tuple[Any, list[tuple[str, tuple[int, ...], int]]] | None = None

    def _add(self, frame: bytes) -> Message | None:
        number, index, total, length, checksum, payload = _read_frame(frame)
        if (number, index) != (self.num_messages, self._next_index):
            _refuse("a frame is missing or out of order",
                    got=f"message {number}, chunk {index}", expected=f"message {self.num_messages}, chunk {self._next_index}")  # fmt: skip
        if index == 0:
            self._total, self._length = total, length
            if not _LENGTH_BYTES <= length <= self.max_message_bytes:
                _refuse("a message is too large or too small", got=f"{length} bytes", expected=f"4 to {self.max_message_bytes} bytes")
        if (total, length) != (self._total, self._length):
            _refuse("chunks of one message disagree", got=f"{total} chunks, {length} bytes",
                    expected=f"{self._total} chunks, {self._length} bytes")  # fmt: skip
        arrived, last = self._arrived + len(payload), index + 1 == total
        if index >= total or len(payload) == 0 or arrived > length or (arrived == length) != last:
            _refuse("chunks do not add up to their message", got=f"{arrived} bytes after chunk {index} of {total}",
                    expected=f"{length} bytes after the last one, and something in each")  # fmt: skip
        if xxh3_64(payload).intdigest() != checksum:
            _refuse("a frame is damaged", got="another checksum", expected=f"{checksum:016x}")
        self._store(payload)
        self._next_index += 1
        return self._finish() if last else None

    def _store(self, payload: memoryview) -> None:
        self._arrived += len(payload)
        while self._kind_and_tensors is None and len(payload):
            part = payload[: self._head_bytes - len(self._head)]
            self._head += part
            payload = payload[len(part) :]
            if len(self._head) == _LENGTH_BYTES:
                header_bytes = int.from_bytes(self._head, "little")
                if not 0 < header_bytes <= min(MAX_HEADER_BYTES, self._length - _LENGTH_BYTES):
                    _refuse("a header is too long", got=f"{header_bytes} bytes",
                            expected=f"1 to {MAX_HEADER_BYTES} bytes, within its message")  # fmt: skip
                self._head_bytes += header_bytes
            elif len(self._head) == self._head_bytes:
                self._kind_and_tensors = _read_header(bytes(self._head[_LENGTH_BYTES:]), self._length - self._head_bytes)
        self._keep(payload)

    def _keep(self, payload: memoryview) -> None:
        """Large pieces stay where gRPC put them; small ones are joined, so that a thousand of them cost no more than one."""
        if len(payload) >= _LARGE_BYTES:
            self._body.append(payload)
        elif len(payload):
            if not (self._body and isinstance(self._body[-1], bytearray) and len(self._body[-1]) < CHUNK_BYTES):
                self._body.append(bytearray())
            self._body[-1] += payload  # type: ignore[operator]

    def _finish(self) -> Message:
        assert self._kind_and_tensors is not None, "a header within its message is read when it is whole"
        body, infos = self._kind_and_tensors
        arrived = (memoryview(part) for part in self._body)
        rest, tensors = memoryview(b""), []
        for codec, shape, num_bytes in infos:
            # Each tensor in memory of its own from torch, which is aligned to 64 bytes; the one copy on the way in.
            data, start = torch.empty(num_bytes, dtype=torch.uint8).numpy().data, 0
            while start < num_bytes:
                rest = rest or next(arrived)
                piece, rest = rest[: num_bytes - start], rest[num_bytes - start :]
                data[start : start + len(piece)] = piece
                start += len(piece)
            tensors.append(Encoded(codec, shape, data))
        self.num_messages += 1
        self._begin()
        return Message(body, tuple(tensors))


def _pieces(message: Message) -> list[memoryview]:
    """The message's bytes, not copied."""
    if len(message.tensors) > MAX_TENSORS:
        _refuse("too many tensors in a message", got=str(len(message.tensors)), expected=f"at most {MAX_TENSORS}")
    for tensor in message.tensors:
        if tensor.num_bytes != encoded_bytes(tensor.shape, tensor.codec):
            _refuse("a tensor's bytes are not those of its shape", got=f"{tensor.codec} {tensor.shape} in {tensor.num_bytes} bytes")
    infos = [pb.TensorInfo(codec=tensor.codec, shape=tensor.shape) for tensor in message.tensors]
    header = pb.Message(tensors=infos, **{message.kind: message.body}).SerializeToString()
    if len(header) > MAX_HEADER_BYTES:
        _refuse("a message has too long a header", got=f"{len(header)} bytes", expected=f"at most {MAX_HEADER_BYTES} bytes",
                do="send smaller micro-batches")  # fmt: skip
    head = len(header).to_bytes(_LENGTH_BYTES, "little") + header
    return [memoryview(head), *(memoryview(tensor.data) for tensor in message.tensors if tensor.num_bytes)]


def _chunks(pieces: Sequence[memoryview], number: int, chunk_bytes: int) -> Iterator[bytes]:
    length = sum(len(piece) for piece in pieces)
    total = -(-length // chunk_bytes)
    which, start = 0, 0
    for index in range(total):
        parts, room = [b""], chunk_bytes
        digest = xxh3_64()
        while room and which < len(pieces):
            part = pieces[which][start : start + room]
            digest.update(part)
            parts.append(part)  # type: ignore[arg-type]
            room -= len(part)
            which, start = (which + 1, 0) if start + len(part) == len(pieces[which]) else (which, start + len(part))
        parts[0] = _frame_head(number, index, total, length, digest.intdigest(), chunk_bytes - room)
        yield b"".join(parts)


def _frame_head(number: int, index: int, total: int, length: int, checksum: int, payload_bytes: int) -> bytes:
    """A serialized Frame up to its payload: the same bytes that protobuf writes, without handing it the payload to copy twice."""
    head = bytearray()
    for tag, value in ((_MESSAGE, number), (_INDEX, index), (_TOTAL, total), (_LENGTH, length)):
        if value:
            head.append(tag)
            _put_varint(head, value)
    if checksum:
        head.append(_CHECKSUM)
        head += checksum.to_bytes(8, "little")
    head.append(_PAYLOAD)
    _put_varint(head, payload_bytes)
    return bytes(head)


def _read_frame(frame: bytes) -> tuple[int, int, int, int, int, memoryview]:
    """Number, index, total, length, checksum and payload of a serialized Frame, the payload not copied."""
    fields: dict[int, int] = {}
    place, last_tag, view = 0, 0, memoryview(frame)
    while place < len(frame):
        tag = frame[place]
        if tag <= last_tag:
            _refuse("a frame's fields are repeated or out of order")
        last_tag = tag
        if tag in (_MESSAGE, _INDEX, _TOTAL, _LENGTH):
            fields[tag], place = _varint(frame, place + 1)
        elif tag == _CHECKSUM:
            fields[tag], place = int.from_bytes(view[place + 1 : place + 9], "little"), place + 9
        elif tag == _PAYLOAD:
            num_bytes, place = _varint(frame, place + 1)
            if num_bytes != len(frame) - place:
                _refuse("a frame is cut off or has a tail", got=f"{len(frame) - place} bytes", expected=f"{num_bytes} bytes")
            number, index, total, length, checksum = (fields.get(t, 0) for t in (_MESSAGE, _INDEX, _TOTAL, _LENGTH, _CHECKSUM))
            return number, index, total, length, checksum, view[place:]
        else:
            _refuse("a frame has a field that is not known", got=f"tag {tag}")
    _refuse("a frame has no payload", got=f"{len(frame)} bytes")


def _read_header(header: bytes, body_bytes: int) -> tuple[Any, list[tuple[str, tuple[int, ...], int]]]:
    """The body, and codec, shape and bytes of each tensor."""
    try:
        message = pb.Message.FromString(header)
    except DecodeError as error:
        raise FrameError("a message's header cannot be read", got=str(error)) from None
    kind = message.WhichOneof("body")
    if kind is None:
        _refuse("a message of a kind that is not known", expected="one of " + ", ".join(_KINDS.values()))
    if len(message.tensors) > MAX_TENSORS:
        _refuse("too many tensors in a message", got=str(len(message.tensors)), expected=f"at most {MAX_TENSORS}")
    infos = [_read_info(info) for info in message.tensors]
    if sum(num_bytes for _, _, num_bytes in infos) != body_bytes:
        _refuse("a message's tensors do not add up", got=f"{body_bytes} bytes", expected=f"{sum(size for _, _, size in infos)} bytes")
    return getattr(message, kind), infos


def _read_info(info: pb.TensorInfo) -> tuple[str, tuple[int, ...], int]:
    if not 1 <= len(info.shape) <= MAX_DIMENSIONS or max(info.shape) > MAX_DIMENSION:
        _refuse("a tensor of a shape that is not allowed", got=f"{len(info.shape)} dimensions",
                expected=f"1 to {MAX_DIMENSIONS}, each of at most {MAX_DIMENSION}")  # fmt: skip
    shape = tuple(info.shape)
    try:
        return info.codec, shape, encoded_bytes(shape, info.codec)
    except KeyError:
        _refuse("a tensor of a codec that is not known", got=info.codec[:20])


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of at most ten bytes, and the place after it."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[place : place + 10], strict=False):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place + shift // 7 + 1
    _refuse("a frame has a number that is cut off or too long")


def _refuse(what: str, *, got: str = "", expected: str = "", do: str = "") -> NoReturn:
    raise FrameError(what, where="split protocol, frames", got=got, expected=expected, do=do)
