"""The host's part of a step: the frozen middle blocks of a shared base, with a device's adapters reached through the session, or lent.

Shape suffixes: B rows, T positions, N real tokens, D width, O outputs of a module, R rank.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from atoll.adapters.layers import LowRankPair, adapted, frozen_pair, merged
from atoll.adapters.state import Kind, ModuleAdapter
from atoll.base.blocks import Skip, blocks_path, counts_in_cache, keeps_keys
from atoll.base.skeleton.build import body_of
from atoll.remote_blocks import Layout
from atoll.split.cut import Cut, gather, moved_to_end, real_positions, spread
from atoll.split.host.blocks.groups import Group, Peer
from atoll.split.host.blocks.kept import KeptRows
from atoll.split.randomness import Draws
from atoll.tasks.packing import attention_mask, documents_seen


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


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What is asked of the middle blocks."""

    layout: Layout
    positions: int
    """Of each row, padding included."""
    train: bool
    front_gradient: bool
    checkpoint: bool = False
    """Keep of every block only what enters it, and run it again in the backward pass."""
    generator: bytes = b""
    """State of the generator from which lent adapters draw what they drop; empty: nothing is dropped."""
    kept: KeptRows | None = None
    """What these positions follow, and are added to; then rows end together in the middle, as they do where a whole base generates."""


class Middle:
    """One session's way through the shared blocks. Of the device, killed modules and the last factors stay here after an exchange.

    `recomputes`: between the forward pass and the backward pass nothing is kept but what entered; then the first is made again.
    """

    def __init__(
        self, model: PreTrainedModel, cut: Cut, groups: Sequence[Sequence[str]], *, returns_tuple: bool, factored: bool, peer: Peer | None,
        killed: Sequence[KilledModule] = (), pause: Callable[[], None] = lambda: None, recomputes: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._pause, self._recomputes = model, pause, recomputes
        self._embedding_width = int(model.get_input_embeddings().embedding_dim)  # type: ignore[arg-type]
        self._takes_positions = "position_ids" in inspect.signature(body_of(model).forward).parameters
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        self.ups_OR: dict[str, Tensor] = {}
        """In factored mode the second factor of every active module, as the device sent it last."""
        self._start: Tensor | None = None
        self._end: Tensor | None = None
        self._real: Tensor | None = None
        self._wanted: Tensor | None = None
        self._asked: Pass | None = None
        self._draws: Draws | None = None
        self._view: Any = shared_view(model)
        self._replaced: list[Any] = []
        """Blocks whose forward is another in this session."""
        self._install_blocks(cut, returns_tuple)
        self.killed: dict[str, LowRankPair] = {}
        """Those that are evaluated, by module."""
        for module in killed:
            base = self._view.get_submodule(module.name)
            pair = self.killed[module.name] = frozen_pair(module.kind, module.adapter, place_of(base))
            self._view.set_submodule(module.name, merged(module.name, base, pair) if module.merge else adapted(base, pair))
        self._groups = [Group(number, names, self._view, self, peer, factored) for number, names in enumerate(groups)]

    @property
    def can_keep(self) -> bool:
        """Whether keys and values are all that the blocks need to know of positions before."""
        return keeps_keys(self._model)

    @property
    def view(self) -> nn.Module:
        """The session's own tree of the shared modules, for lent adapters."""
        view: nn.Module = self._view
        return view

    def forward(self, h_ND: Tensor, asked: Pass) -> tuple[Tensor, bytes]:
        """Hidden states at the wanted positions, from those that enter the first middle block at all real tokens; and where the
        generator stands after that.
        """
        self.enter(h_ND, asked)
        state = self._compute(asked.train and not self._recomputes)
        assert self._end is not None
        end_ND = self._end.detach()
        if self._recomputes:
            self._end = None  # Made again for the backward pass; until then only the caller holds it.
        return end_ND, state

    def enter(self, h_ND: Tensor, asked: Pass) -> None:
        """Begin a pass whose forward half is made elsewhere, and here only in the backward pass: for one that recomputes."""
        layout = asked.layout
        self._asked = asked
        self._real = real_positions(layout.lengths, asked.positions, h_ND.device)
        self._wanted = self._real if layout.wanted_N is None else layout.wanted_N.to(h_ND.device)
        if asked.kept is not None:
            self._real, self._wanted = (
                None if at is None else moved_to_end(at, layout.lengths, asked.positions) for at in (self._real, self._wanted)
            )
            asked.kept.add(layout.lengths, asked.positions)
        self._start = spread(h_ND, self._real, len(layout.lengths), asked.positions)

    def backward(self, g_ND: Tensor) -> Tensor | None:
        """Back through the middle blocks; the gradient by what entered them, at real tokens, where the forward pass was asked for it."""
        if self._recomputes:
            self._compute(True)
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
        self._start = self._end = self._asked = None
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
            blocks._modules[str(number)] = skip = Skip(returns_tuple)
            counts_in_cache(skip, number)
        for number in range(first, last + 1):
            blocks[number].forward = self._checkpointed(blocks[number].forward)
        # The model's own code makes masks, positions and rotary tables; only what flows between the blocks is replaced.
        enter = blocks[first].forward
        blocks[first].forward = lambda _, *args, **kwargs: enter(self._start, *args, **kwargs)
        leave = blocks[last].forward
        blocks[last].forward = lambda *args, **kwargs: self._leave(leave(*args, **kwargs))
        self._replaced = [blocks[number] for number in range(first, last + 1)]
        for number in range(first + 1, last + 1):
            blocks[number].register_forward_pre_hook(self._pause_before)

    def _pause_before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Between two blocks others may compute, on the way there and on the way back."""
        self._let_others()
        h_BTD: Tensor = args[0]
        if h_BTD.requires_grad:
            h_BTD.register_hook(lambda _: self._pause())

    def _let_others(self) -> None:
        if self._draws is None:
            self._pause()
            return
        self._draws.swap()
        try:
            self._pause()
        finally:
            self._draws.swap()

    def _checkpointed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def on() -> bool:
            return self._asked is not None and self._asked.checkpoint and torch.is_grad_enabled()

        again = partial(checkpoint, forward, use_reentrant=False)
        return lambda *args, **kwargs: (again if on() else forward)(*args, **kwargs)

    def _leave(self, out: Any) -> Any:
        end = out[0] if isinstance(out, tuple) else out
        # Where a device map spreads the blocks, what the device sends and gets is where the first of them is.
        self._end = end.to(self._anchor.device)
        after = end.detach()
        return (after, *out[1:]) if isinstance(out, tuple) else after

    def _compute(self, grads: bool) -> bytes:
        """Fill `_end` from `_start`, for a backward pass or without; where the generator stands after that."""
        assert self._asked is not None
        assert self._start is not None
        asked, rows = self._asked, len(self._asked.layout.lengths)
        self._draws = Draws(self._anchor.device, asked.generator) if asked.generator else None
        with torch.set_grad_enabled(grads), nullcontext() if self._draws is None else self._draws:
            self._start.requires_grad_(grads and asked.front_gradient)
            self._run(asked.layout, rows, asked.positions, asked.kept)
            assert self._end is not None
            self._end = gather(self._end, self._wanted)
        state = b"" if self._draws is None else self._draws.state
        self._draws = None
        return state

    def _run(self, layout: Layout, rows: int, positions: int, kept: KeptRows | None) -> None:
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
        if kept is not None:
            inputs |= {"use_cache": True, "past_key_values": kept.cache, "attention_mask": kept.real_BT.long()}
            if self._takes_positions:
                inputs["position_ids"] = kept.places_BT[:, -positions:]
        body_of(self._view)(**inputs)
