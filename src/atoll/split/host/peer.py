"""The device of a session as its middle blocks see it.

Shape suffixes: N real tokens, D width, I inputs of a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from atoll.split.counted_stream import CountedStream, check_shapes, tensors_of
from atoll.split.host.blocks.lent import LentAdapters
from atoll.split.host.compute_queue import Turns
from atoll.split.transport import lost
from atoll.wire import protocol_pb2 as pb
from atoll.wire.frames import Message
from atoll.wire.handshake import HostFacts

Groups = Sequence[Sequence[str]]


class DevicePeer:
    """The device as the middle blocks see it: sends, waits and checks sizes. While it waits, other sessions compute."""

    def __init__(
        self, stream: CountedStream, groups: Groups, facts: HostFacts, ranks: Mapping[str, int], model: PreTrainedModel, turns: Turns,
        *, while_waiting: Callable[[], None],
    ) -> None:  # fmt: skip
        """`while_waiting` is done before each wait for a gradient, when the turn is another's."""
        self._stream, self._turns, self._model, self._while_waiting = stream, turns, model, while_waiting
        self._groups, self._sizes, self._ranks = groups, facts.modules, ranks
        self.factored = False
        self.lent: LentAdapters | None = None
        """In lent mode."""
        self.exchange, self.num_tokens, self.num_positions = 0, 0, 0

    def receive(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The tensors of the next message, which must have these shapes.

        Raises: ProtocolError, FrameError, HostLostError.
        """
        with self._turns.release():
            message = self._receive(shapes)
        return tensors_of(message, self._model.dtype, self._model.device)

    def receive_gradient(self, shape: tuple[int, ...], announce: Callable[[Tensor], None]) -> tuple[Message, Tensor]:
        """The next message and its tensor of this shape, which is announced before the turn comes back.

        Raises: ProtocolError, FrameError, HostLostError.
        """
        with self._turns.release():
            self._while_waiting()
            message = self._receive([shape])
            (grad_ND,) = tensors_of(message, self._model.dtype, self._model.device)
            announce(grad_ND)
        return message, grad_ND

    def _receive(self, shapes: Sequence[tuple[int, ...]]) -> Message:
        message = self._stream.receive()
        if message.kind == "bye":
            raise lost("the device ended the session within an exchange")
        check_shapes(message, shapes)
        return message

    def send(self, body: Any, tensors: Sequence[Tensor], codecs: Sequence[str] | None = None) -> None:
        """Send a message."""
        self._stream.send(body, tensors, codecs)

    def send_input(self, group: int, x_NI: Tensor) -> None:
        """Send what a group's modules read."""
        self.send(pb.Input(exchange=self.exchange, group=group), [x_NI])

    def receive_output(self, group: int) -> list[Tensor]:
        """Wait for what the group's adapters add."""
        widths = [self._ranks[name] if self.factored else self._sizes[name][1] for name in self._groups[group]]
        return self.receive([(self.num_tokens, width) for width in widths])

    def send_gradient(self, group: int, tensors: Sequence[Tensor], *, want_input_gradient: bool) -> None:
        """Send a group's gradients."""
        self.send(pb.Gradient(exchange=self.exchange, group=group, want_input_gradient=want_input_gradient), tensors)

    def receive_input_gradient(self, group: int) -> Tensor:
        """Wait for what the group's adapters add to the gradient by its input."""
        return self.receive([(self.num_tokens, self._sizes[self._groups[group][0]][0])])[0]

    def factor_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the second factors, transposed, or of both that are lent, in the order in which they come."""
        if self.lent is not None:
            return self.lent.shapes
        return [(self._ranks[name], self._sizes[name][1]) for group in self._groups for name in group]
