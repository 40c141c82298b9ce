"""The host's part of a step: the frozen middle blocks of a shared base, with a device's adapters reached through the session.

Shape suffixes: B rows, T positions, N real tokens, D width, I inputs and O outputs of a module, R rank.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from transformers import PreTrainedModel

from atoll.adapters.layers import adapted, frozen_pair, merged
from atoll.adapters.state import Kind, ModuleAdapter
from atoll.base.blocks import Skip, blocks_path
from atoll.base.skeleton.build import body_of
from atoll.remote_blocks import Layout
from atoll.split.cut import Cut, add_at, gather, plus_at, real_positions, spread
from atoll.tasks.packing import attention_mask, documents_seen


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


def shared_view(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every weight, so that a session can hang its own modules into it."""
    clone: Any = module.__class__.__new__(module.__class__)
    clone.__dict__ = dict(module.__dict__)
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        clone.__dict__[hooks] = OrderedDict(module.__dict__[hooks])
    clone._buffers = dict(module._buffers)  # Some rotary tables are made anew when a row is longer than any before.
    clone._modules = {name: None if child is None else shared_view(child) for name, child in module._modules.items()}
    if "_hf_hook" in clone.__dict__:
        # A device map hangs a forward of its own on every module, bound to that module: it would run the original with all below it.
        hooked = clone.__dict__.pop("forward")
        clone._old_forward = clone.forward
        clone.forward = partial(hooked.func, clone)
    return clone


def place_of(module: nn.Module) -> torch.device:
    """Where a module of the base computes: not where its weight is between two passes, if a device map keeps that elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    weight: Any = module.weight
    return weight.device if hook is None else torch.device(hook.execution_device)


@dataclass(frozen=True, slots=True, eq=False)
class KilledModule:
    """An adapter that the device does not train."""

    name: str
    kind: Kind
    adapter: ModuleAdapter
    merge: bool
    """Add it to the session's own copy of the weight, rather than evaluate it beside the shared one."""


class Middle:
    """One session's way through the shared blocks. Of the device, killed modules and the last factors stay here after an exchange."""

    def __init__(
        self, model: PreTrainedModel, cut: Cut, groups: Sequence[Sequence[str]], *, returns_tuple: bool, factored: bool, peer: Peer,
        killed: Sequence[KilledModule] = (), pause: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._model, self._pause = model, pause
        self._embedding_width = int(model.get_input_embeddings().embedding_dim)  # type: ignore[arg-type]
        self._takes_positions = "position_ids" in inspect.signature(body_of(model).forward).parameters
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        self.ups_OR: dict[str, Tensor] = {}
        """In factored mode the second factor of every active module, as the device sent it last."""
        self._start: Tensor | None = None
        self._end: Tensor | None = None
        self._real: Tensor | None = None
        self._wanted: Tensor | None = None
        self._view: Any = shared_view(model)
        self._replaced: list[Any] = []
        """Blocks whose forward is another in this session."""
        self._install_blocks(cut, returns_tuple)
        for module in killed:
            base = self._view.get_submodule(module.name)
            pair = frozen_pair(module.kind, module.adapter, place_of(base))
            self._view.set_submodule(module.name, merged(module.name, base, pair) if module.merge else adapted(base, pair))
        self._groups = [_Group(number, names, self._view, self, peer, factored) for number, names in enumerate(groups)]

    def forward(self, h_ND: Tensor, layout: Layout, positions: int, *, train: bool, front_gradient: bool) -> Tensor:
        """Hidden states at the wanted positions, from those that enter the first middle block at all real tokens."""
        rows = len(layout.lengths)
        self._real = real_positions(layout.lengths, positions, h_ND.device)
        self._wanted = self._real if layout.wanted_N is None else layout.wanted_N.to(h_ND.device)
        h_BTD = spread(h_ND, self._real, rows, positions)
        with torch.set_grad_enabled(train):
            self._start = h_BTD.requires_grad_(train and front_gradient)
            self._run(layout, rows, positions)
            assert self._end is not None
            self._end = gather(self._end, self._wanted)
        return self._end.detach()

    def backward(self, g_ND: Tensor) -> Tensor | None:
        """Back through the middle blocks; the gradient by what entered them, at real tokens, where the forward pass was asked for it."""
        assert self._end is not None
        assert self._start is not None
        # In the calling thread, whatever the device: the engine's own worker would wait for this session's network with all others behind.
        with torch.autograd.set_multithreading_enabled(False):
            if self._end.requires_grad:
                self._end.backward(g_ND)
        grad_BTD = self._start.grad
        self.clear()
        return None if grad_BTD is None else gather(grad_BTD, self._real)

    def take_factors(self, ups_RO: Sequence[Tensor]) -> None:
        """In factored mode the second factor of every active module, transposed, group by group; none: those of before hold."""
        if ups_RO:
            names = [name for group in self._groups for name in group.names]
            self.ups_OR = {name: up_RO.T for name, up_RO in zip(names, ups_RO, strict=True)}

    def clear(self) -> None:
        """Forget the activations."""
        self._start = self._end = None
        for group in self._groups:
            group.clear()

    def close(self) -> None:
        """Let go of the session's modules: they refer to each other, so that merged weights would wait for the garbage collector."""
        self.clear()
        for block in self._replaced:
            del block.forward
        self._view, self._groups, self._replaced = None, [], []

    @property
    def real(self) -> Tensor | None:
        """Flat positions of the real tokens; None: all."""
        return self._real

    @property
    def anchor(self) -> Tensor:
        """Needs a gradient, so that the first active group has one to pass on though nothing below it is trained."""
        return self._anchor

    def _install_blocks(self, cut: Cut, returns_tuple: bool) -> None:
        blocks: Any = self._view.get_submodule(blocks_path(self._model))
        first, last = cut.front, len(blocks) - cut.back - 1
        for number in (*range(first), *range(last + 1, len(blocks))):
            blocks._modules[str(number)] = Skip(returns_tuple)
        # The model's own code makes masks, positions and rotary tables; only what flows between the blocks is replaced.
        enter = blocks[first].forward
        blocks[first].forward = lambda _, *args, **kwargs: enter(self._start, *args, **kwargs)
        leave = blocks[last].forward
        blocks[last].forward = lambda *args, **kwargs: self._leave(leave(*args, **kwargs))
        self._replaced = list({id(block): block for block in (blocks[first], blocks[last])}.values())
        for number in range(first + 1, last + 1):
            blocks[number].register_forward_pre_hook(self._pause_before)

    def _pause_before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Between two blocks others may compute, on the way there and on the way back."""
        self._pause()
        h_BTD: Tensor = args[0]
        if h_BTD.requires_grad:
            h_BTD.register_hook(lambda _: self._pause())

    def _leave(self, out: Any) -> Any:
        end = out[0] if isinstance(out, tuple) else out
        # Where a device map spreads the blocks, what the device sends and gets is where the first of them is.
        self._end = end.to(self._anchor.device)
        after = end.detach()
        return (after, *out[1:]) if isinstance(out, tuple) else after

    def _run(self, layout: Layout, rows: int, positions: int) -> None:
        device, dtype = self._anchor.device, self._model.dtype
        inputs: dict[str, Any] = {
            "inputs_embeds": torch.zeros(1, 1, 1, device=device, dtype=dtype).expand(rows, positions, self._embedding_width),
            "use_cache": False,
        }
        if layout.position_ids_BT is not None:
            document_BT = (layout.position_ids_BT == 0).cumsum(1).cpu().numpy()
            inputs["attention_mask"] = attention_mask(documents_seen(document_BT)).to(device)
            if self._takes_positions:
                inputs["position_ids"] = layout.position_ids_BT.to(device)
        body_of(self._view)(**inputs)


class _Group:
    """Modules that read the same tensor: one message each way serves them all."""

    def __init__(self, number: int, names: Sequence[str], view: nn.Module, middle: Middle, peer: Peer, factored: bool) -> None:
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

    def __init__(self, group: _Group, place: int, base: nn.Module) -> None:
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
    def forward(ctx: Any, x: Tensor, anchor: Tensor, group: _Group) -> tuple[Tensor, ...]:
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
        group: _Group = ctx.group
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
