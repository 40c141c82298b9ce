"""One end of a session: messages out and in, checked by the dialogue, encoded, cut into frames and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from atoll.errors import ProtocolError
from atoll.wire.dialogue import Dialogue
from atoll.wire.encoding import decode, encode
from atoll.wire.frames import Assembler, Message, Packer

GREETING_BYTES = 2**21
"""Largest message before the sizes of a session are known: a header, and a little."""


class Transport(Protocol):
    """Carries frames between two processes, in order, each whole or not at all."""

    idle_seconds: float
    """How long the other side may be waited for, to say something or to take something."""
    left_seconds: float
    """How long it may be waited for all told, until this is set anew."""
    waiting: Callable[[], AbstractContextManager[None]]
    """Opened around a wait for the other side to take something."""

    def write(self, frame: bytes) -> None:
        """Hand a frame over; waits while too many are on their way. Raises: HostLostError."""

    def read(self) -> bytes:
        """The next frame. Raises: HostLostError where none comes in time."""

    def close(self) -> None:
        """End the session; the other side's read fails."""


class CountedStream:
    """Speaks the dialogue over a transport. `sent_bytes` and `received_bytes` count whole frames by message kind."""

    def __init__(self, dialogue: Dialogue, transport: Transport, codec: str) -> None:
        self.dialogue, self.transport, self.codec = dialogue, transport, codec
        self.sent_bytes: Counter[str] = Counter()
        self.received_bytes: Counter[str] = Counter()
        self.on_wait: Callable[[Any, bool], None] = lambda wait, is_first: None
        """Told of every Wait, and whether it is the first since another message."""
        self._packer, self._assembler = Packer(), Assembler(GREETING_BYTES)

    def allow(self, max_message_bytes: int) -> None:
        """Take larger messages from now on: before both sides know each other, only a greeting."""
        self._assembler.max_message_bytes = max_message_bytes

    def send(self, body: Any, tensors: Sequence[Tensor] = (), codecs: Sequence[str] | None = None) -> None:
        """Send a message with its tensors, encoded in the session's codec or, one by one, in these.

        Raises: ProtocolError where the dialogue does not allow it now; HostLostError.
        """
        each = zip(tensors, codecs or [self.codec] * len(tensors), strict=True)
        message = Message(body, tuple(encode(tensor, codec) for tensor, codec in each))
        self.dialogue.sent(message)
        for frame in self._packer.frames(message):
            self.sent_bytes[message.kind] += len(frame)
            self.transport.write(frame)

    def receive(self) -> Message:
        """The next message, which the dialogue allows now.

        Raises: FrameError, ProtocolError, HostLostError.
        """
        num_bytes, has_waited = 0, False
        while True:
            frame = self.transport.read()
            num_bytes += len(frame)
            message = self._assembler.add(frame)
            if message is not None:
                self.received_bytes[message.kind] += num_bytes
                self.dialogue.received(message)
                if message.kind != "wait":
                    return message
                self.on_wait(message.body, not has_waited)
                num_bytes, has_waited = 0, True


def tensors_of(message: Message, dtype: torch.dtype, device: torch.device, part: slice = slice(None)) -> list[Tensor]:
    """The tensors of a message, or a part of them, decoded."""
    return [decode(encoded, dtype=dtype, device=device) for encoded in message.tensors[part]]


def check_shapes(message: Message, shapes: Sequence[tuple[int, ...]]) -> None:
    """Whether the message's tensors have these shapes, where the dialogue cannot know them.

    Raises: ProtocolError.
    """
    got = [encoded.shape for encoded in message.tensors]
    if got != list(shapes):
        raise ProtocolError(
            f"tensors of a {message.kind} message", got=_shapes(got), expected=_shapes(shapes),
            do="use the same base and the same version of Atoll on both sides",
        )  # fmt: skip


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes) or "none"
