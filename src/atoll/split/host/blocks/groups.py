"""Modules whose adapters are on the device: what they read is sent there, and what the adapters add comes back.

Shape suffixes: N real tokens, I inputs and O outputs of a module, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from atoll.split.cut import add_at, gather, plus_at


class Peer(Protocol):
    """The device, as the middle blocks see it; groups count from 0 in execution order, tensors hold real tokens only."""

    def send_input(self, group: int, x_NI: Tensor) -> None:
        """What the modules of a group read."""

    def receive_output(self, group: int) -> list[Tensor]:
        """For each module what its adapter adds (N x O), or in factored mode its low-rank activations (N x R)."""

    def send_gradient(self, group: int, tensors: Sequence[Tensor], *, want_input_gradient: bool) -> None:
        """For each module dL/dy (N x O), or in factored mode dL/du (N x R) and the gradient by up, transposed (R x O)."""

    def receive_input_gradient(self, group: int) -> Tensor:
        """What the group's adapters add to dL/dx, summed (N x I)."""


class Positions(Protocol):
    """Of the pass that runs, what a group must know."""

    ups_OR: dict[str, Tensor]
    """In factored mode the second factor of every active module."""

    @property
    def real(self) -> Tensor | None:
        """Flat positions of the real tokens; None: all."""

    @property
    def anchor(self) -> Tensor:
        """Needs a gradient, so that the first active group has one to pass on though nothing below it is trained."""


class Group:
    """Modules that read the same tensor: one message each way serves them all."""

    def __init__(self, number: int, names: Sequence[str], view: nn.Module, middle: Positions, peer: Peer | None, factored: bool) -> None:
        assert peer is not None, "without the device there is nobody to ask for what the adapters add"
        self.number, self.names, self.middle, self.peer, self.factored = number, tuple(names), middle, peer, factored
        self.bases = [view.get_submodule(name) for name in names]
        self._seen: Tensor | None = None
        self._outputs: list[Tensor] = []
        for place, (name, base) in enumerate(zip(names, self.bases, strict=True)):
            view.set_submodule(name, _Member(self, place, base))

    def output(self, place: int, x: Tensor) -> Tensor:
        """What the module at this place gives for x; all of the group are computed when the first of them is called."""
        if self._seen is not x:
            self._outputs = list(_Cut.apply(x, self.middle.anchor, self))
            self._seen = x
        return self._outputs[place]

    def clear(self) -> None:
        """Forget the last pass."""
        self._seen, self._outputs = None, []


class _Member(nn.Module):
    """Stands for one module of a group."""

    def __init__(self, group: Group, place: int, base: nn.Module) -> None:
        super().__init__()
        self.group, self.place, self.base = group, place, base

    @property
    def weight(self) -> Tensor:
        """The base's weight: some families look at a projection's weight (its dtype or device) from outside."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., inputs) to (..., outputs)."""
        return self.group.output(self.place, x)


class _Cut(torch.autograd.Function):
    """y = base(x) + adapter(x) for each module of a group, the adapters on the device.

    What the device needs is sent before the base's own product is computed, in both directions, so that the two overlap.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, group: Group) -> tuple[Tensor, ...]:
        wants, real = ctx.needs_input_grad[0], _beside(group.middle.real, x)
        group.peer.send_input(group.number, gather(x, real))
        with torch.set_grad_enabled(wants):
            inner = x.detach().requires_grad_(wants)
            ys = [base(inner) for base in group.bases]
        parts = group.peer.receive_output(group.number)
        outs = []
        for name, y, part in zip(group.names, ys, parts, strict=True):
            added = part @ group.middle.ups_OR[name].T if group.factored else part
            outs.append(plus_at(y.detach(), real, added.to(y.device)))
        # The way back is kept without the values that led there.
        ctx.inner, ctx.group = inner, group
        ctx.edges = [get_gradient_edge(y) for y in ys] if wants else []
        ctx.lows = parts if group.factored else None
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        group: Group = ctx.group
        wants, real, home = ctx.needs_input_grad[0], _beside(group.middle.real, grads[0]), group.middle.anchor.device
        outgoing: list[Tensor] = []
        for place, grad in enumerate(grads):
            g_NO = gather(grad, real).to(home)
            if group.factored:
                outgoing += [g_NO @ group.middle.ups_OR[group.names[place]], ctx.lows[place].T @ g_NO]
            else:
                outgoing.append(g_NO)
        group.peer.send_gradient(group.number, outgoing, want_input_gradient=wants)
        if not wants:
            return None, None, None
        (grad_x,) = torch.autograd.grad(ctx.edges, ctx.inner, grads)
        add_at(grad_x, real, group.peer.receive_input_gradient(group.number).to(grad_x.device))
        return grad_x, None, None


def _beside(real: Tensor | None, x: Tensor) -> Tensor | None:
    return None if real is None else real.to(x.device)
