"""Put adapters on a model and take them off again; the base's own modules and weights are never changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atoll.adapters.layers import AdaptedLinear, LowRankPair
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.elsewhere import find_elsewhere
from atoll.errors import AdapterFitError


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """Adapters while they sit on a model: all trainable numbers in one flat tensor, every module's matrices views of it.

    One tensor is one optimizer step, one gradient norm and one memory block, however many modules there are.
    """

    flat: nn.Parameter
    layers: dict[str, LowRankPair]
    start: AdapterState

    def state(self) -> AdapterState:
        """The adapters as they are now, copied."""
        modules = {
            name: ModuleAdapter(layer.down_RI.detach().cpu().clone(), layer.up_OR.detach().cpu().clone(), layer.scaling)
            for name, layer in self.layers.items()
        }
        return AdapterState(self.start.kind, modules)

    def train(self, on: bool) -> None:
        """Switch the adapters' dropout on or off; the base stays in eval mode."""
        for layer in self.layers.values():
            layer.training = on


@contextmanager
def attached(model: nn.Module, state: AdapterState, *, dropout: float = 0.0) -> Iterator[Attached]:
    """The model with these adapters, inside a `with`; outside it the base is as before.

    Adapters of modules that run elsewhere are given to the model's stand-in for them.

    Raises: AdapterFitError where a module is missing, of another size, or not a linear layer.
    """
    device = next(model.parameters()).device
    flat, views = _flatten(state, device)
    layers: dict[str, LowRankPair] = {}
    originals: dict[str, nn.Module] = {}
    elsewhere = find_elsewhere(model)
    try:
        for name, adapter in state.modules.items():
            pair = (*views[name], adapter.scaling, dropout)
            if elsewhere is not None and elsewhere.sizes.get(name) == adapter.size:
                layers[name] = elsewhere.adapters[name] = LowRankPair(state.kind, *pair).eval()
                continue
            originals[name] = _fitting_module(model, name, adapter)
            layers[name] = AdaptedLinear(originals[name], state.kind, *pair).eval()
            model.set_submodule(name, layers[name])
        yield Attached(flat, layers, state)
    finally:
        if elsewhere is not None:
            elsewhere.adapters.clear()
        for name, module in originals.items():
            model.set_submodule(name, module)


def module_size(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear module of any kind; None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def _fitting_module(model: nn.Module, name: str, adapter: ModuleAdapter) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterFitError(
            "the adapter is for a module that this model does not have",
            got=name, expected="modules such as " + ", ".join(_some_linear_names(model)),
            do="use the adapter with the base model it was trained on",
        ) from None  # fmt: skip
    if module_size(module) != adapter.size:
        raise AdapterFitError(
            f"the adapter does not fit {name}",
            got=f"adapter for (inputs, outputs) = {adapter.size}", expected=f"{module_size(module) or type(module).__name__}",
            do="use the adapter with the base model it was trained on",
        )  # fmt: skip
    return module


def _some_linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module_size(module) is not None][:3]


def _flatten(state: AdapterState, device: torch.device) -> tuple[nn.Parameter, dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """One flat parameter with its gradient, and leaf parameters (with gradients) that are views of both."""
    flat = nn.Parameter(torch.empty(state.num_parameters, device=device))
    flat.grad = torch.zeros_like(flat)
    views, offset = {}, 0

    def view(value: Tensor) -> nn.Parameter:
        nonlocal offset
        part = slice(offset, offset + value.numel())
        offset = part.stop
        leaf = nn.Parameter(flat.data[part].view_as(value))
        leaf.data.copy_(value)
        assert flat.grad is not None
        leaf.grad = flat.grad[part].view_as(value)
        return leaf

    for name, adapter in state.modules.items():
        views[name] = (view(adapter.down_RI), view(adapter.up_OR))
    return flat, views


def merge_into(model: nn.Module, state: AdapterState) -> None:
    """Add the adapters' dense changes to the base's weights, for good (lora only)."""
    for name, adapter in state.modules.items():
        module = _fitting_module(model, name, adapter)
        assert isinstance(module.weight, Tensor)
        delta = adapter.delta_OI().to(module.weight.device)
        change = delta.T if isinstance(module, Conv1D) else delta
        module.weight.data.copy_((module.weight.double() + change).to(module.weight.dtype))
