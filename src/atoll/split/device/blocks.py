"""The device's part of a step: a placeholder for the middle blocks, which runs them in the host and its own adapters here.

Shape suffixes: B rows, T positions, N real tokens, D width, I inputs and O outputs of a module, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.adapters.layers import LowRankPair
from atoll.errors import PeerError
from atoll.remote_blocks import Layout, RemoteBlocksPlaceholder
from atoll.split.counted_stream import CountedStream, check_shapes, tensors_of
from atoll.split.cut import gather, real_positions, spread
from atoll.wire import protocol_pb2 as pb
from atoll.wire.frames import Message
from atoll.wire.handshake import refusal_error

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """An open session: who may speak, and what the host and the device agreed on."""

    stream: CountedStream
    groups: Groups
    """Active modules in execution order, those that read the same tensor together."""
    factored: bool
    host: str
    """Its address, for errors."""


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """The adapters of a session, by module: those trained here, and those that the host evaluates or (`merges`) merges."""

    trained: Mapping[str, LowRankPair]
    killed: Mapping[str, LowRankPair]
    merges: bool

    def fits(self, other: Given) -> bool:
        """Whether a session that was opened for the other serves these: it knows ranks of trained ones, and killed ones themselves."""

        def known(given: Given) -> object:
            return {name: (pair.size, pair.kind) for name, pair in given.trained.items()}, given.killed, given.merges

        return known(self) == known(other)


class RemoteBlocks(RemoteBlocksPlaceholder):
    """The middle blocks of a base, in a host. `connect` opens a session for adapters, `retrying` does something again after a loss."""

    def __init__(
        self, sizes: Mapping[str, tuple[int, int]], *, returns_tuple: bool, keeps_back: bool,
        connect: Callable[[Given], Session], retrying: Callable[[Callable[[], Tensor]], Tensor],
    ) -> None:  # fmt: skip
        super().__init__(sizes)
        self.returns_tuple, self.keeps_back, self.connect, self.retrying = returns_tuple, keeps_back, connect, retrying
        self.session: Session | None = None
        self._given = Given({}, {}, False)
        self._sent_factors: list[Tensor] = []
        self._anchor = torch.zeros((), requires_grad=True)  # no parameter: it is no part of the base

    def forward(self, h_BTD: Tensor) -> Any:
        """What the last middle block gives for the hidden states that enter the first; zeros where nobody will look."""
        layout = self.layout or Layout(lengths=(h_BTD.shape[1],) * h_BTD.shape[0])
        # Without an adapter of its own, what comes out needs a gradient only where what goes in does.
        anchor = self._anchor if self.adapters else None
        out: Tensor = _RemoteMiddle.apply(h_BTD, anchor, self, layout, torch.is_grad_enabled())
        return (out, None) if self.returns_tuple else out

    def open(self) -> Session:
        """The session for the adapters that are attached now; another one ends first."""
        given = Given(dict(self.adapters), dict(self.killed), self.merges)  # type: ignore[arg-type]
        if self.session is None or not given.fits(self._given):
            self.end()
            self.session, self._given = self.connect(given), given
            self._sent_factors = []
        return self.session

    def end(self) -> None:
        """Say goodbye, if there is anybody to say it to."""
        if self.session is not None:
            with suppress(PeerError):  # A host that is gone needs no goodbye.
                self.session.stream.send(pb.Bye())
        self.drop()

    def drop(self) -> None:
        """Forget the session."""
        if self.session is not None:
            self.session.stream.transport.close()
        self.session = None

    def exchange(self, h_BTD: Tensor, layout: Layout, *, train: bool, front_gradient: bool) -> Exchange:
        """Start an exchange with the host."""
        session = self.open()
        wanted_N = None if self.keeps_back else layout.wanted_N
        return Exchange(self, session, h_BTD, layout, wanted_N, train=train, front_gradient=front_gradient)

    def new_factors(self, session: Session) -> list[Tensor]:
        """The second factor of every active module, transposed, where it is not what the host has already."""
        pairs: dict[str, LowRankPair] = self.adapters  # type: ignore[assignment]
        # Cloned: of rank 1, the transposed view would be the living parameter itself, and never differ from what was sent.
        factors = [pairs[name].up_OR.detach().T.clone(memory_format=torch.contiguous_format) for names in session.groups for name in names]
        # Compared by value: the optimizer moves all adapters as one tensor, which leaves no mark on these views.
        known = len(factors) == len(self._sent_factors) and all(map(torch.equal, factors, self._sent_factors))
        self._sent_factors = factors
        return [] if known else factors


class _RemoteMiddle(torch.autograd.Function):
    """The middle blocks as one function. Gradients by the adapters go straight to them: they are no inputs of it."""

    @staticmethod
    def forward(ctx: Any, h_BTD: Tensor, anchor: Tensor | None, blocks: RemoteBlocks, layout: Layout, grads: bool) -> Tensor:
        front_gradient = grads and ctx.needs_input_grad[0]
        train = front_gradient or (grads and bool(blocks.adapters))
        if not train:  # Such an exchange leaves nothing behind, and can be had again.
            ctx.exchange = None
            return blocks.retrying(lambda: blocks.exchange(h_BTD, layout, train=False, front_gradient=False).forward(h_BTD))
        ctx.exchange = blocks.exchange(h_BTD, layout, train=True, front_gradient=front_gradient)
        return ctx.exchange.forward(h_BTD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        grad = None if ctx.exchange is None else ctx.exchange.backward(grads[0])
        return grad, None, None, None, None


@dataclass(frozen=True, slots=True, eq=False)
class _Passed:
    """What the backward pass of a group needs: its input; by module A x, the same cut off from it, and what the adapter gives."""

    x_NI: Tensor
    lows: list[Tensor]
    cut: list[Tensor]
    parts: list[Tensor]


class Exchange:
    """One pass of a micro-batch through the middle blocks, seen from the device."""

    def __init__(
        self, blocks: RemoteBlocks, session: Session, h_BTD: Tensor, layout: Layout, wanted_N: Tensor | None, *, train: bool,
        front_gradient: bool,
    ) -> None:  # fmt: skip
        self.session, self.number, self.layout = session, session.stream.dialogue.exchange, layout
        self.train, self.front_gradient = train, front_gradient
        self._pairs: Mapping[str, Any] = blocks.adapters
        self._blocks = blocks
        self._shape, self._dtype, self._device = h_BTD.shape, h_BTD.dtype, h_BTD.device
        self._real = real_positions(layout.lengths, h_BTD.shape[1], h_BTD.device)
        self._wanted = self._real if wanted_N is None else wanted_N
        self._wanted_N = wanted_N
        self._passed: list[_Passed] = []

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Hidden states out of the last middle block, at the wanted positions; zeros elsewhere."""
        stream = self.session.stream
        factors = self._blocks.new_factors(self.session) if self.session.factored else []
        stream.send(self._request(bool(factors)), [gather(h_BTD, self._real), *factors])
        for number, names in enumerate(self.session.groups):
            message = self._receive("input")
            # Of all that a host sends this alone has a width that the dialogue cannot know.
            check_shapes(message, [(sum(self.layout.lengths), self._blocks.sizes[names[0]][0])])
            (x_NI,) = self._tensors(message)
            wants = self.train and (number > 0 or self.front_gradient)
            with torch.set_grad_enabled(self.train):
                x_NI.requires_grad_(wants)
                lows = [self._pairs[name].low(x_NI) for name in names]
                # Cut in two, so that the gradient by u is made once for both that need it.
                cut = [low.detach().requires_grad_(self.train) for low in lows]
                parts = lows if self.session.factored else [self._pairs[name].high(u) for name, u in zip(names, cut, strict=True)]
            stream.send(pb.Output(exchange=self.number, group=number), [part.detach() for part in parts])
            if self.train:
                self._passed.append(_Passed(x_NI, lows, cut, parts))
        (hidden_ND,) = self._tensors(self._receive("hidden"))
        return spread(hidden_ND, self._wanted, self._shape[0], self._shape[1])

    def backward(self, g_BTD: Tensor) -> Tensor | None:
        """Add the adapters' gradients to them; the gradient by the hidden states that were sent, where it was asked for."""
        stream = self.session.stream
        stream.send(pb.HiddenGradient(exchange=self.number), [gather(g_BTD, self._wanted)])
        for number in reversed(range(len(self.session.groups))):
            message = self._receive("gradient")
            grads = self._tensors(message)
            passed, pairs = self._passed.pop(), [self._pairs[name] for name in self.session.groups[number]]
            factored = self.session.factored
            low_grads = grads[::2] if factored else torch.autograd.grad(passed.parts, passed.cut, grads, retain_graph=True)
            if message.body.want_input_gradient:
                # What the host waits for goes first; the adapters' own gradients are made while it works.
                (grad_NI,) = torch.autograd.grad(passed.lows, passed.x_NI, low_grads, retain_graph=True)
                stream.send(pb.InputGradient(exchange=self.number, group=number), [grad_NI])
            torch.autograd.backward(passed.lows, low_grads, inputs=[pair.down_RI for pair in pairs])
            if factored:
                for pair, up_RO in zip(pairs, grads[1::2], strict=True):
                    pair.up_OR.grad += up_RO.T
            else:
                torch.autograd.backward(passed.parts, grads, inputs=[pair.up_OR for pair in pairs])
        rest = self._tensors(self._receive("finished"))
        return spread(rest[0], self._real, self._shape[0], self._shape[1]) if self.front_gradient else None

    def _request(self, has_factors: bool) -> Any:
        return pb.Forward(
            exchange=self.number, rows=self._shape[0], positions=self._shape[1], lengths=[] if self._real is None else self.layout.lengths,
            wanted=[] if self._wanted_N is None else self._wanted_N.tolist(),
            position_ids=[] if self.layout.position_ids_BT is None else self.layout.position_ids_BT.flatten().tolist(),
            train=self.train, want_front_gradient=self.front_gradient, has_factors=has_factors,
        )  # fmt: skip

    def _receive(self, kind: str) -> Message:
        message = self.session.stream.receive()
        if message.kind == "refusal":
            raise refusal_error(message.body, self.session.host)
        assert message.kind == kind, "the dialogue allows nothing else"
        return message

    def _tensors(self, message: Message) -> list[Tensor]:
        return tensors_of(message, self._dtype, self._device)
