"""One pass of a micro-batch through the middle blocks, seen from a device that lends its adapters to the host for the optimizer step.

Shape suffixes: B rows, T positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atoll.split.counted_stream import tensors_of
from atoll.split.cut import gather, spread
from atoll.split.device.exchange import Exchange
from atoll.split.randomness import generator_state, set_generator_state
from atoll.wire import protocol_pb2 as pb


class LentExchange(Exchange):
    """Two round trips, whatever the number of layers; the host sums the adapters' gradients until the exchange that ends the step."""

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Hidden states out of the last middle block, at the wanted positions; zeros elsewhere."""
        session, pairs = self.session, [self._pairs[name] for name in self.session.names]
        factors = session.new_factors([matrix for pair in pairs for matrix in (pair.down_RI, pair.up_OR)])
        request = self._request(bool(factors))
        request.checkpoint = self.asked.train and self.asked.checkpoint
        # What is dropped is drawn where the adapters are: what was drawn in the blocks before goes on there, and then here again.
        if self.asked.train and any(pair.drops for pair in pairs):
            request.generator = generator_state(self._device)
        codecs = [session.stream.codec] + [session.adapter_codec] * len(factors)
        session.stream.send(request, [gather(h_BTD, self._real), *factors], codecs)
        message = self._receive("hidden")
        if request.generator:
            set_generator_state(self._device, message.body.generator)
        return self._result(message)

    def backward(self, g_BTD: Tensor) -> Tensor | None:
        """The gradient by the hidden states that were sent, where it was asked for; at the step's end the adapters' are added to them."""
        session, pairs = self.session, [self._pairs[name] for name in self.session.names]
        ends_step = self.asked.ends_step and bool(pairs)
        gradient = pb.HiddenGradient(exchange=self.number, want_factor_gradients=ends_step)
        session.stream.send(gradient, [gather(g_BTD, self._wanted)])
        message, wants_front = self._receive("finished"), self.asked.front_gradient
        front_ND = tensors_of(message, self._dtype, self._device, slice(1))[0] if wants_front else None
        if ends_step:
            session.sent_factors = []  # The host has forgotten them.
            # The adapters' own precision, whatever the base has.
            grads = iter(tensors_of(message, torch.float32, self._device, slice(int(wants_front), None)))
            for pair in pairs:
                for matrix in (pair.down_RI, pair.up_OR):
                    assert matrix.grad is not None
                    matrix.grad += next(grads)
        return None if front_ND is None else spread(front_ND, self._real, self._shape[0], self._shape[1])
