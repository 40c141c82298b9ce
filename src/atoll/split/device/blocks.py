"""The device's part of a step: a placeholder for the middle blocks, which runs them in the host.

Shape suffixes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.adapters.layers import LowRankPair
from atoll.errors import PeerError
from atoll.remote_blocks import Growth, Layout, RemoteBlocksPlaceholder
from atoll.split.device.exchange import Asked, Exchange, Session
from atoll.split.device.growing import Growing
from atoll.split.device.lent import LentExchange
from atoll.wire import protocol_pb2 as pb


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """The adapters of a session, by module: those trained here, and those that the host evaluates or (`merges`) merges."""

    trained: Mapping[str, LowRankPair]
    killed: Mapping[str, LowRankPair]
    merges: bool

    def fits(self, other: Given) -> bool:
        """Whether a session that was opened for the other serves these: it knows ranks of trained ones, and killed ones themselves."""

        def known(given: Given) -> object:
            trained = {name: (pair.size, pair.kind, pair.scaling, pair.dropout) for name, pair in given.trained.items()}
            return trained, given.killed, given.merges

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
        self._growing: Growing | None = None
        self._anchor = torch.zeros((), requires_grad=True)  # no parameter: it is no part of the base

    def forward(self, h_BTD: Tensor) -> Any:
        """What the last middle block gives for the hidden states that enter the first; zeros where nobody will look."""
        if self._growing is not None:
            return self._grown(self._growing, h_BTD)
        layout = self.layout or Layout(lengths=(h_BTD.shape[1],) * h_BTD.shape[0])
        # Without an adapter of its own, what comes out needs a gradient only where what goes in does.
        anchor = self._anchor if self.adapters else None
        out: Tensor = _RemoteMiddle.apply(h_BTD, anchor, self, layout, torch.is_grad_enabled())
        return (out, None) if self.returns_tuple else out

    @contextmanager
    def grow(self, growth: Growth) -> Iterator[None]:
        """Forward passes inside are those of one generation, and need no gradients."""
        self._growing = Growing(growth, self._start, keeps_back=self.keeps_back)
        try:
            yield
        finally:
            self._growing = None

    def _grown(self, growing: Growing, h_BTD: Tensor) -> Any:
        growing.enter(h_BTD)
        out = self.retrying(lambda: growing.forward(self.open(), h_BTD.shape[1]))
        return (out, None) if self.returns_tuple else out

    def open(self) -> Session:
        """The session for the adapters that are attached now; another one ends first."""
        given = Given(dict(self.adapters), dict(self.killed), self.merges)  # type: ignore[arg-type]
        if self.session is None or not given.fits(self._given):
            self.end()
            self.session, self._given = self.connect(given), given
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
        wanted_N = None if self.keeps_back else layout.wanted_N
        return self._start(self.open(), h_BTD, Asked(layout, wanted_N, train, front_gradient, self.ends_step, self.checkpoint))

    def _start(self, session: Session, h_BTD: Tensor, asked: Asked) -> Exchange:
        pairs: dict[str, LowRankPair] = self.adapters  # type: ignore[assignment]
        return (LentExchange if session.mode == "lent" else Exchange)(session, pairs, h_BTD, asked)


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
