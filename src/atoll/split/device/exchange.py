"""One pass of a micro-batch through the middle blocks, seen from a device that keeps its adapters: dense and factored mode.

Shape suffixes: B rows, T positions, N real tokens, D width, I inputs and O outputs of a module, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atoll.adapters.layers import LowRankPair
from atoll.remote_blocks import Layout
from atoll.split.counted_stream import CountedStream, check_shapes, tensors_of
from atoll.split.cut import gather, real_positions, spread
from atoll.wire import protocol_pb2 as pb
from atoll.wire.byte_formulas import WireMode
from atoll.wire.frames import Message
from atoll.wire.handshake import refusal_error

Groups = tuple[tuple[str, ...], ...]


@dataclass(slots=True, eq=False)
class Session:
    """An open session: who may speak, and what the host and the device agreed on."""

    stream: CountedStream
    groups: Groups
    """Active modules in execution order, those that read the same tensor together."""
    mode: WireMode
    host: str
    """Its address, for errors."""
    adapter_codec: str = "fp32"
    """In lent mode."""
    sent_factors: list[Tensor] = field(default_factory=list)
    """Those that the host has."""

    @property
    def names(self) -> tuple[str, ...]:
        """Active modules, in the order in which their tensors travel."""
        return tuple(name for group in self.groups for name in group)

    def new_factors(self, factors: list[Tensor]) -> list[Tensor]:
        """The factors, copied, where they are not what the host has already; else none."""
        # Cloned: of rank 1, a transposed view would be the living parameter itself, and never differ from what was sent.
        factors = [factor.detach().clone(memory_format=torch.contiguous_format) for factor in factors]
        # Compared by value: the optimizer moves all adapters as one tensor, which leaves no mark on these views.
        known = len(factors) == len(self.sent_factors) and all(map(torch.equal, factors, self.sent_factors))
        self.sent_factors = factors
        return [] if known else factors


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What is asked of an exchange."""

    layout: Layout
    wanted_N: Tensor | None
    """Flat positions whose hidden state is wanted; None: all real tokens."""
    train: bool
    front_gradient: bool
    ends_step: bool = True
    """Whether it is the last of its optimizer step."""
    checkpoint: bool = False
    """Whether activations are computed again in the backward pass."""
    keep: bool = False
    """Whether the host shall keep keys and values of these positions."""
    follows: int = 0
    """How many positions of each row these follow, of which the host keeps them."""


@dataclass(frozen=True, slots=True, eq=False)
class _Passed:
    """What the backward pass of a group needs: its input; by module A x, the same cut off from it, and what the adapter gives."""

    x_NI: Tensor
    lows: list[Tensor]
    cut: list[Tensor]
    parts: list[Tensor]


class Exchange:
    """One pass of a micro-batch through the middle blocks, seen from the device."""

    def __init__(self, session: Session, pairs: Mapping[str, LowRankPair], h_BTD: Tensor, asked: Asked) -> None:
        self.session, self.number, self.asked = session, session.stream.dialogue.exchange, asked
        self._pairs = pairs
        self._shape, self._dtype, self._device = h_BTD.shape, h_BTD.dtype, h_BTD.device
        self._real = real_positions(asked.layout.lengths, h_BTD.shape[1], h_BTD.device)
        self._wanted = self._real if asked.wanted_N is None else asked.wanted_N
        self._passed: list[_Passed] = []
        self.kept = False
        """Whether the host now keeps keys and values of these positions."""
        self.evicted = False
        """Whether the host did nothing, as it no longer has what these follow."""

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Hidden states out of the last middle block, at the wanted positions; zeros elsewhere, and where the host did nothing."""
        stream, factored = self.session.stream, self.session.mode == "factored"
        factors = self.session.new_factors([self._pairs[name].up_OR.T for name in self.session.names]) if factored else []
        stream.send(self._request(bool(factors)), [gather(h_BTD, self._real), *factors])
        for number, names in enumerate(self.session.groups):
            message = self._receive("input", "hidden")
            if message.kind == "hidden":
                break
            # Of all that a host sends this alone has a width that the dialogue cannot know.
            check_shapes(message, [(sum(self.asked.layout.lengths), self._pairs[names[0]].size[0])])
            (x_NI,) = self._tensors(message)
            wants = self.asked.train and (number > 0 or self.asked.front_gradient)
            with torch.set_grad_enabled(self.asked.train):
                x_NI.requires_grad_(wants)
                lows = [self._pairs[name].low(x_NI) for name in names]
                # Cut in two, so that the gradient by u is made once for both that need it.
                cut = [low.detach().requires_grad_(self.asked.train) for low in lows]
                parts = lows if factored else [self._pairs[name].high(u) for name, u in zip(names, cut, strict=True)]
            stream.send(pb.Output(exchange=self.number, group=number), [part.detach() for part in parts])
            if self.asked.train:
                self._passed.append(_Passed(x_NI, lows, cut, parts))
        else:
            message = self._receive("hidden")
        return self._result(message)

    def backward(self, g_BTD: Tensor) -> Tensor | None:
        """Add the adapters' gradients to them; the gradient by the hidden states that were sent, where it was asked for."""
        stream = self.session.stream
        stream.send(pb.HiddenGradient(exchange=self.number), [gather(g_BTD, self._wanted)])
        for number in reversed(range(len(self.session.groups))):
            message = self._receive("gradient")
            grads = self._tensors(message)
            passed, pairs = self._passed.pop(), [self._pairs[name] for name in self.session.groups[number]]
            factored = self.session.mode == "factored"
            low_grads = grads[::2] if factored else torch.autograd.grad(passed.parts, passed.cut, grads, retain_graph=True)
            if message.body.want_input_gradient:
                # What the host waits for goes first; the adapters' own gradients are made while it works.
                (grad_NI,) = torch.autograd.grad(passed.lows, passed.x_NI, low_grads, retain_graph=True)
                stream.send(pb.InputGradient(exchange=self.number, group=number), [grad_NI])
            torch.autograd.backward(passed.lows, low_grads, inputs=[pair.down_RI for pair in pairs])
            if factored:
                for pair, up_RO in zip(pairs, grads[1::2], strict=True):
                    assert pair.up_OR.grad is not None
                    pair.up_OR.grad += up_RO.T
            else:
                torch.autograd.backward(passed.parts, grads, inputs=[pair.up_OR for pair in pairs])
        rest = self._tensors(self._receive("finished"))
        return spread(rest[0], self._real, self._shape[0], self._shape[1]) if self.asked.front_gradient else None

    def _request(self, has_factors: bool) -> Any:
        asked, layout = self.asked, self.asked.layout
        return pb.Forward(
            exchange=self.number, rows=self._shape[0], positions=self._shape[1], lengths=[] if self._real is None else layout.lengths,
            wanted=[] if asked.wanted_N is None else asked.wanted_N.tolist(),
            position_ids=[] if layout.position_ids_BT is None else layout.position_ids_BT.flatten().tolist(),
            train=asked.train, want_front_gradient=asked.front_gradient, has_factors=has_factors, keep=asked.keep, follows=asked.follows,
        )  # fmt: skip

    def _result(self, message: Message) -> Tensor:
        """What a Hidden says."""
        self.kept, self.evicted = message.body.kept, message.body.evicted
        if self.evicted:
            return torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        (hidden_ND,) = self._tensors(message)
        return spread(hidden_ND, self._wanted, self._shape[0], self._shape[1])

    def _receive(self, *kinds: str) -> Message:
        message = self.session.stream.receive()
        if message.kind == "refusal":
            raise refusal_error(message.body, self.session.host, opened=True)
        assert message.kind in kinds, "the dialogue allows nothing else"
        return message

    def _tensors(self, message: Message) -> list[Tensor]:
        return tensors_of(message, self._dtype, self._device)
