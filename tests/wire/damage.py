"""Ways to damage frames on their way, for tests and for the fuzz benchmark."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from xxhash import xxh3_64_intdigest

from atoll.wire import protocol_pb2 as pb
from atoll.wire.frames import Message, Packer

Frames = list[bytes]


def flipped(frames: Frames, at: int, random: random.Random) -> Frames:
    """One bit the other way, anywhere."""
    frame = bytearray(frames[at])
    frame[random.randrange(len(frame))] ^= 1 << random.randrange(8)
    return [*frames[:at], bytes(frame), *frames[at + 1 :]]


def scrambled_head(frames: Frames, at: int, random: random.Random) -> Frames:
    """Some of the first bytes, where the frame's fields lie, replaced."""
    frame = bytearray(frames[at])
    for _ in range(random.randint(1, 4)):
        place = random.randrange(min(len(frame), 24))
        frame[place] = (frame[place] + random.randint(1, 255)) % 256
    return [*frames[:at], bytes(frame), *frames[at + 1 :]] if bytes(frame) != frames[at] else flipped(frames, at, random)


def cut_off(frames: Frames, at: int, random: random.Random) -> Frames:
    """The end of a frame missing."""
    return [*frames[:at], frames[at][: random.randrange(len(frames[at]))], *frames[at + 1 :]]


def stuffed(frames: Frames, at: int, random: random.Random) -> Frames:
    """Bytes too many, somewhere."""
    place, more = random.randint(0, len(frames[at])), random.randbytes(random.randint(1, 12))
    return [*frames[:at], frames[at][:place] + more + frames[at][place:], *frames[at + 1 :]]


def thinned(frames: Frames, at: int, random: random.Random) -> Frames:
    """Bytes missing inside."""
    start = random.randrange(len(frames[at]))
    return [*frames[:at], frames[at][:start] + frames[at][start + random.randint(1, 12) :], *frames[at + 1 :]]


def noise(frames: Frames, at: int, random: random.Random) -> Frames:
    """Something else entirely."""
    return [*frames[:at], random.randbytes(random.randint(0, 80)), *frames[at + 1 :]]


def other_field(frames: Frames, at: int, random: random.Random) -> Frames:
    """One field of the frame with another value, all else right."""
    frame = pb.Frame.FromString(frames[at])
    field, largest = random.choice((("message", 2**64), ("index", 2**32), ("total", 2**32), ("length", 2**64), ("checksum", 2**64)))
    near, right = random.random() < 0.5, getattr(frame, field)
    setattr(frame, field, (right + random.choice((-1, 1))) % largest if near else (right + random.randrange(1, largest)) % largest)
    return [*frames[:at], frame.SerializeToString(), *frames[at + 1 :]]


def missing(frames: Frames, at: int, random: random.Random) -> Frames:
    """A frame lost."""
    return [*frames[:at], *frames[at + 1 :]]


def repeated(frames: Frames, at: int, random: random.Random) -> Frames:
    """A frame twice."""
    return [*frames[: at + 1], frames[at], *frames[at + 1 :]]


def swapped(frames: Frames, at: int, random: random.Random) -> Frames:
    """Two frames in the wrong order."""
    at, other = sorted(random.sample(range(len(frames)), 2))
    return [*frames[:at], frames[other], *frames[at + 1 : other], frames[at], *frames[other + 1 :]]


DAMAGES: Sequence[Callable[[Frames, int, random.Random], Frames]] = (
    flipped, scrambled_head, cut_off, stuffed, thinned, noise, other_field, missing, repeated, swapped,
)  # fmt: skip
"""What a bad line or a faulty sender does: every one of them must be found."""


def forged(frames: Frames, at: int, random: random.Random) -> Frames:
    """Bytes of the message replaced and the checksum made to fit: what a hostile sender does; the message may then be a right one."""
    frame = pb.Frame.FromString(frames[at])
    payload = bytearray(frame.payload)
    for _ in range(random.randint(1, 6)):
        payload[random.randrange(min(len(payload), 80))] = random.randrange(256)
    frame.payload, frame.checksum = bytes(payload), xxh3_64_intdigest(payload)
    return [*frames[:at], frame.SerializeToString(), *frames[at + 1 :]]


def packed(messages: Sequence[Message], chunk_bytes: int) -> Frames:
    """The frames of one direction."""
    packer = Packer(chunk_bytes)
    return [frame for message in messages for frame in packer.frames(message)]
