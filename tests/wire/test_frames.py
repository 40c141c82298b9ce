"""Messages as frames and back; frames as protobuf reads and writes them; limits; damage of every kind."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from atoll.errors import FrameError
from atoll.wire import protocol_pb2 as pb
from atoll.wire.encoding import Encoded, decode, encode, raw
from atoll.wire.frames import MAX_HEADER_BYTES, MAX_TENSORS, Assembler, Message, Packer

from tests.wire.damage import DAMAGES, forged, packed
from tests.wire.talk import Talk

LIMIT = 10**6


def assembled(frames: list[bytes], limit: int = LIMIT) -> list[Message]:
    assembler = Assembler(limit)
    messages = [message for frame in frames if (message := assembler.add(frame)) is not None]
    assert not assembler.inside
    return messages


def same(a: Message, b: Message) -> bool:
    ours, theirs = ([(tensor.codec, tensor.shape, bytes(tensor.data)) for tensor in message.tensors] for message in (a, b))
    return a.body == b.body and ours == theirs


def frames_of(message: bytes, chunk_bytes: int = 10**6, length: int | None = None) -> list[bytes]:
    """Right frames around any bytes, written by protobuf."""
    chunks = [message[start : start + chunk_bytes] for start in range(0, len(message), chunk_bytes)]
    return [
        pb.Frame(message=0, index=index, total=len(chunks), length=len(message) if length is None else length,
                 checksum=xxh3_64_intdigest(chunk), payload=chunk).SerializeToString()
        for index, chunk in enumerate(chunks)
    ]  # fmt: skip


def message_bytes(header: pb.Message, body: bytes = b"") -> bytes:
    head = header.SerializeToString()
    return len(head).to_bytes(4, "little") + head + body


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.sampled_from(["fp32", "bf16", "int8"]), st.sampled_from(["dense", "factored"]))
def test_a_session_comes_back_at_any_chunk_size(chunk_bytes: int, codec: str, mode: str) -> None:
    messages = [message for _, message in Talk(mode, codec).session()]
    back = assembled(packed(messages, chunk_bytes))
    assert len(back) == len(messages)
    assert all(map(same, back, messages))
    assert [message.kind for message in back] == [message.kind for message in messages]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 2**20])
def test_frames_are_those_of_protobuf(chunk_bytes: int) -> None:
    """Written and read by hand for speed: the same bytes, field by field, that the library writes."""
    expected = (0, 0)
    for frame in packed([message for _, message in Talk().session()], chunk_bytes):
        theirs = pb.Frame.FromString(frame)
        assert theirs.SerializeToString() == frame
        assert theirs.checksum == xxh3_64_intdigest(theirs.payload)
        assert len(theirs.payload) <= chunk_bytes
        assert (theirs.message, theirs.index) == expected
        expected = (theirs.message + 1, 0) if theirs.index == theirs.total - 1 else (theirs.message, theirs.index + 1)


def test_the_messages_of_a_stream_are_numbered() -> None:
    packer, body = Packer(), Message(pb.Bye())
    numbers = [pb.Frame.FromString(frame).message for _ in range(300) for frame in packer.frames(body)]
    assert numbers == list(range(300))


def test_tensors_arrive_writable_and_aligned() -> None:
    tensors = tuple(encode(torch.full((3, 5), float(number)), "fp32") for number in range(3))
    (message,) = assembled(packed([Message(pb.Output(), tensors)], 64))
    arrived = [decode(tensor) for tensor in message.tensors]
    for number, tensor in enumerate(arrived):
        assert tensor.data_ptr() % 4 == 0
        tensor.add_(1)
        assert torch.equal(tensor, torch.full((3, 5), number + 1.0))


def test_a_message_without_bytes_in_its_tensors_passes() -> None:
    message = Message(pb.FilePart(name="empty", sha256="0"), (raw(b""), encode(torch.zeros(0, 4), "int8")))
    assert same(assembled(packed([message], 100))[0], message)


def test_a_stream_that_stops_inside_a_message_is_seen() -> None:
    assembler = Assembler(LIMIT)
    for frame in packed([Talk().hello()[1]], 20)[:-1]:
        assert assembler.add(frame) is None
    assert assembler.inside


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found(damage) -> None:  # type: ignore[no-untyped-def]
    """Two hundred times each way: FrameError and nothing else, and every message before it whole."""
    chance = random.Random(damage.__name__)
    messages = [message for _, message in Talk("factored").session()]
    frames = packed(messages, 150)
    whole = [pb.Frame.FromString(frame).message for frame in frames]
    for _ in range(200):
        at = chance.randrange(len(frames) - 1)
        broken = damage(frames, at, chance)
        assert broken != frames
        first = next(number for number, (ours, theirs) in enumerate(zip(broken, frames, strict=False)) if ours != theirs)
        assembler, arrived = Assembler(LIMIT), []
        with pytest.raises(FrameError):
            arrived.extend(message for frame in broken if (message := assembler.add(frame)) is not None)
        # A wrong number of chunks, too, is known at once: nothing is handed on from the first bad frame on.
        assert len(arrived) == whole[first] or (len(arrived) == whole[first] + 1 and damage.__name__ == "repeated")
        assert all(map(same, arrived, messages))
        with pytest.raises(FrameError, match="after a damaged one"):
            assembler.add(frames[0])


def test_forged_messages_are_refused_or_are_messages() -> None:
    chance, refused, passed = random.Random(1), 0, 0
    frames = packed([message for _, message in Talk().session()], 2**20)
    for _ in range(500):
        assembler = Assembler(LIMIT)
        try:
            for frame in forged(frames, chance.randrange(len(frames)), chance):
                message = assembler.add(frame)
                assert isinstance(message, Message)
            passed += 1
        except FrameError:
            refused += 1
    assert refused > 100
    assert passed > 10


@pytest.mark.parametrize("field", ["message", "index", "total", "length", "checksum", "payload"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_every_field_of_a_frame_counts(field: str, at: int) -> None:
    message = Message(pb.Finished(), (encode(torch.zeros(8, 4), "fp32"),))
    frames = packed([message, message], 60)
    assert len(frames) == 6
    for wrong in (0, 1, 2, 3, 59, 2**31, 2**63):
        frame = pb.Frame.FromString(frames[at])
        wrong_value = bytes(min(wrong, 90)) if field == "payload" else wrong
        if (field in ("index", "total") and wrong >= 2**32) or getattr(frame, field) == wrong_value:
            continue
        setattr(frame, field, wrong_value)
        with pytest.raises(FrameError):
            assembled([*frames[:at], frame.SerializeToString(), *frames[at + 1 :]])


@pytest.mark.parametrize(("header", "body", "reason"), [
    (pb.Message(), b"", "header is too long"),
    (pb.Message(tensors=[pb.TensorInfo(codec="fp32", shape=[1])]), b"\0" * 4, "kind that is not known"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="fp64", shape=[1])]), b"\0" * 8, "codec"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(shape=[1])]), b"\0" * 8, "codec"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="fp32")]), b"\0" * 4, "shape"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="fp32", shape=[1, 1, 1, 1])]), b"\0" * 4, "shape"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="fp32", shape=[2**31, 0])]), b"", "shape"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="fp32", shape=[2**64 - 1])]), b"", "shape"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="fp32", shape=[2**31 - 1] * 3)]), b"", "do not add up"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="fp32", shape=[2])]), b"\0" * 7, "do not add up"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="int8", shape=[2, 2])]), b"\0" * 4, "do not add up"),
    (pb.Message(bye=pb.Bye()), b"\0", "do not add up"),
    (pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="raw", shape=[0])] * (MAX_TENSORS + 1)), b"", "too many tensors"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_headers_that_lie_are_refused(header: pb.Message, body: bytes, reason: str) -> None:
    for chunk_bytes in (10**6, 3):
        with pytest.raises(FrameError, match=reason):
            assembled(frames_of(message_bytes(header, body), chunk_bytes))


@pytest.mark.parametrize("header_bytes", [0, 6, 2**20 + 1, 2**32 - 1])
def test_header_lengths_that_lie_are_refused(header_bytes: int) -> None:
    with pytest.raises(FrameError):
        assembled(frames_of(header_bytes.to_bytes(4, "little") + b"\x62\x00\x00\x00\x00"))


def test_fields_come_once_and_in_order() -> None:
    (frame,) = packed([Message(pb.Bye())], 100)
    total, length, rest = frame[:2], frame[2:4], frame[4:]
    assert len(assembled([total + length + rest])) == 1
    for wrong in (total + total + length + rest, length + total + rest, b"\x08\x01\x08\x00" + frame):
        with pytest.raises(FrameError, match="repeated or out of order"):
            assembled([wrong])


def test_an_empty_chunk_is_refused() -> None:
    """Written out, which protobuf would not do; a stream of them would never end."""
    first = pb.Frame.FromString(frames_of(message_bytes(pb.Message(bye=pb.Bye())), 4)[0])
    first.total = 3
    empty = pb.Frame(index=1, total=3, length=first.length, checksum=xxh3_64_intdigest(b"")).SerializeToString() + b"\x32\x00"
    assembler = Assembler(LIMIT)
    assert assembler.add(first.SerializeToString()) is None
    with pytest.raises(FrameError, match="do not add up"):
        assembler.add(empty)


def test_a_header_that_is_no_protobuf_is_refused() -> None:
    with pytest.raises(FrameError, match="cannot be read"):
        assembled(frames_of((2).to_bytes(4, "little") + b"\xff\xff"))


def test_a_message_that_ends_inside_its_header_is_refused() -> None:
    for count in (1, 3, 4, 5):
        with pytest.raises(FrameError):
            assembled(frames_of(message_bytes(pb.Message(bye=pb.Bye()))[:count]))


def test_a_field_that_a_later_version_added_to_a_header_is_passed_over() -> None:
    header = pb.Message(bye=pb.Bye()).SerializeToString() + b"\xfa\x3e\x01a"
    (message,) = assembled(frames_of(len(header).to_bytes(4, "little") + header))
    assert message.kind == "bye"


def test_the_limit_is_kept() -> None:
    message = message_bytes(pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="raw", shape=[100])]), bytes(100))
    assert assembled(frames_of(message), limit=len(message))
    with pytest.raises(FrameError, match="too large"):
        assembled(frames_of(message), limit=len(message) - 1)


def test_a_length_is_not_believed() -> None:
    """A frame that announces a terabyte takes no more memory than the frame."""
    header = pb.Message(bye=pb.Bye(), tensors=[pb.TensorInfo(codec="raw", shape=[2**20, 2**20])])
    head = message_bytes(header)
    frame = pb.Frame(total=2**20, length=len(head) + 2**40, checksum=xxh3_64_intdigest(head), payload=head).SerializeToString()
    assembler = Assembler(2**41)
    tracemalloc.start()
    assert assembler.add(frame) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_tiny_chunks_cost_no_more_memory_than_large_ones() -> None:
    frames = packed([Message(pb.FilePart(name="f"), (raw(bytes(20_000)),))], 1)
    assembler = Assembler(LIMIT)
    tracemalloc.start()
    for frame in frames[:-1]:
        assembler.add(frame)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 60_000


def test_what_the_other_side_would_refuse_is_not_sent() -> None:
    with pytest.raises(FrameError, match="not those of its shape"):
        Packer().frames(Message(pb.Bye(), (Encoded("fp32", (2,), b"\0" * 4),)))
    with pytest.raises(FrameError, match="too many tensors"):
        Packer().frames(Message(pb.Bye(), (raw(b""),) * (MAX_TENSORS + 1)))
    with pytest.raises(FrameError, match="too long a header"):
        Packer().frames(Message(pb.Forward(wanted=[2**31] * (MAX_HEADER_BYTES // 5))))
