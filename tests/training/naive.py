"""Kill-and-Revive written out: hooks, autograd and one torch.optim.AdamW for every module. Slow, and shares no code with the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.training.trainer import Batches

Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]
Pick = Callable[[Mapping[str, float]], Sequence[str]]


def kill_and_revive(
    model: PreTrainedModel, start: AdapterState, batches: Batches, pick: Pick, *, steps: int, window: int, period: int, killed: str,
    learning_rate: float, grad_clip: float = 1.0, reset: bool = False, variation: str = "change",
) -> tuple[AdapterState, list[tuple[str, ...]]]:  # fmt: skip
    """The adapters after so many steps at a constant rate, and the active modules of each step."""
    pairs: Pairs = {n: (nn.Parameter(a.down_RI.clone()), nn.Parameter(a.up_OR.clone())) for n, a in start.modules.items()}
    optimizers = {name: torch.optim.AdamW(pair, lr=learning_rate, weight_decay=0.0) for name, pair in pairs.items()}
    before: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    active, told = tuple(pairs), []
    for step in range(steps):
        if step % period == 0:
            active, before = tuple(pairs), {name: _flat(pair) for name, pair in pairs.items()}
            norms = dict.fromkeys(pairs, 0.0)
        if step % period == window:
            far = norms if variation == "gradient" else {name: float((_flat(pair) - before[name]).norm()) for name, pair in pairs.items()}
            scores = {name: value / math.sqrt(before[name].numel()) for name, value in far.items()}
            active = tuple(pick(scores))
            if reset:
                for name in set(pairs) - set(active):
                    optimizers[name].state.clear()
        told.append(active)
        for name, norm in _step(model, start, pairs, optimizers, batches, step, active, killed, grad_clip).items():
            norms[name] += norm
    modules = {n: ModuleAdapter(d.detach().clone(), u.detach().clone(), start.modules[n].scaling) for n, (d, u) in pairs.items()}
    return AdapterState(start.kind, modules), told


def _step(
    model: PreTrainedModel, start: AdapterState, pairs: Pairs, optimizers: Mapping[str, torch.optim.AdamW], batches: Batches, step: int,
    active: Sequence[str], killed: str, grad_clip: float,
) -> dict[str, float]:  # fmt: skip
    """One step; the norm of each active module's gradient."""
    evaluated = [name for name in pairs if name in active or killed != "skip"]
    hooks = [model.get_submodule(name).register_forward_hook(_adds(start, name, pairs[name])) for name in evaluated]
    batch = batches.batch(step)
    logits_ND = model(input_ids=batch.input_ids_BT).logits.flatten(0, 1)[batch.predict_N]
    nn.functional.cross_entropy(logits_ND, batch.target_N).backward()
    for hook in hooks:
        hook.remove()
    trained = [matrix for name in active for matrix in pairs[name]]
    if grad_clip:
        nn.utils.clip_grad_norm_(trained, grad_clip)
    norms = {name: float(torch.cat([matrix.grad.flatten() for matrix in pairs[name]]).norm()) for name in active}  # type: ignore[union-attr]
    for name in active:
        optimizers[name].step()
    for pair in pairs.values():
        for matrix in pair:
            matrix.grad = None
    return norms


def _adds(start: AdapterState, name: str, pair: tuple[nn.Parameter, nn.Parameter]) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        u = args[0] @ pair[0].T
        return output + start.modules[name].scaling * (u.relu() if start.kind == "bottleneck" else u) @ pair[1].T

    return hook


def _flat(pair: tuple[nn.Parameter, nn.Parameter]) -> Tensor:
    return torch.cat([matrix.detach().flatten() for matrix in pair]).clone()
