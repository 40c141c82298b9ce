"""Put adapters on a model and take them off again; the base's own modules and weights are never changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.layers import FullWeightLinear, LowRankPair, adapted, changed, frozen_pair, merged, merged_weight
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AdapterFitError
from atoll.remote_blocks import find_placeholder

T = TypeVar("T", bound=nn.Module)
KilledHow = Literal["offload", "skip", "merge"]


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """All numbers of some modules' adapters in one tensor with its gradient; the modules' own matrices are views of it.

    One tensor is one optimizer step, one gradient norm and one memory block, however many modules there are.
    """

    numbers: nn.Parameter
    parts: Mapping[str, slice]
    """By module: down, then up; or the change of its weight, then that of its bias."""

    @property
    def grad(self) -> Tensor:
        """The gradient that the modules' matrices write into."""
        assert self.numbers.grad is not None
        return self.numbers.grad


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """Adapters while they sit on a model: `layers` are trained, in the tensors of `flats`; the others of `start` are killed."""

    flats: tuple[Flat, ...]
    layers: dict[str, LowRankPair]
    start: AdapterState
    full_weights: dict[str, FullWeightLinear]
    """Modules whose full weights are trained; none of them is ever killed."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of all modules that are trained."""
        return (*self.layers, *self.full_weights)

    def state(self) -> AdapterState:
        """The adapters as they are now, copied; killed ones as they were."""
        modules = dict(self.start.modules)
        for name, layer in self.layers.items():
            modules[name] = ModuleAdapter(layer.down_RI.detach().cpu().clone(), layer.up_OR.detach().cpu().clone(), layer.scaling)
        full_weights = {
            name: FullWeightDelta(*(part.detach().cpu().clone() for part in (layer.change_OI, layer.bias_O) if part is not None))
            for name, layer in self.full_weights.items()
        }  # fmt: skip
        return AdapterState(self.start.kind, modules, full_weights)

    def train(self, on: bool) -> None:
        """Switch the adapters' dropout on or off; the base stays in eval mode."""
        for layer in self.layers.values():
            layer.training = on


@dataclass(frozen=True, slots=True)
class Killed:
    """Modules that are not trained, and what becomes of them: evaluated where their blocks run, left out, or merged."""

    names: Collection[str] = ()
    how: KilledHow = "offload"


@contextmanager
def attached(
    model: nn.Module, state: AdapterState, *, dropout: float = 0.0, killed: Killed | None = None, cohorts: Sequence[Sequence[str]] = (),
    frozen_delta: AdapterState | None = None,
) -> Iterator[Attached]:  # fmt: skip
    """The model with these adapters, inside a `with`; outside it the base is as before.

    Adapters of modules that run in a host are given to the model's placeholder for them. `cohorts` are the trained modules that share one
    flat tensor; none given: all of them. The `frozen_delta` counts as part of the base: evaluated and frozen, on modules with an adapter
    in `state` and on others.

    Raises: AdapterFitError where a module is missing, of another size, not a linear layer, or cannot be merged; or where the frozen delta
    is of a module that runs in a host.
    """
    killed = killed or Killed()
    trained = [name for name in state.modules if name not in killed.names]
    flats, views = _flatten(state, cohorts or [[*trained, *state.full_weights]], next(model.parameters()).device)
    places = _Places(model, frozen_delta)
    layers: dict[str, LowRankPair] = {}
    try:
        for name in trained:
            adapter = state.modules[name]
            down_RI, up_OR = views[name]
            layers[name] = places.put(name, adapter, LowRankPair(state.kind, down_RI, up_OR, adapter.scaling, dropout).eval())
        full_weights = {name: places.put_full_weights(name, change, *views[name]) for name, change in state.full_weights.items()}
        if killed.how != "skip":
            for name in killed.names:
                places.put_killed(name, state.modules[name], frozen_pair(state.kind, state.modules[name], places.device), killed.how)
        places.put_rest_of_frozen_delta()
        yield Attached(flats, layers, state, full_weights)
    finally:
        places.clear()


class _Places:
    """The modules of a model, and what was put in their stead."""

    def __init__(self, model: nn.Module, frozen_delta: AdapterState | None) -> None:
        self.model, self.remote_blocks = model, find_placeholder(model)
        self.device = next(model.parameters()).device
        self._frozen_delta = frozen_delta or AdapterState("lora", {})
        self._originals: dict[str, nn.Module] = {}
        for name, adapter in self._frozen_delta.modules.items():
            if self._is_remote(name, adapter):
                raise AdapterFitError(
                    "a module that runs in a host has a frozen delta", got=name, expected="modules that run here",
                    do='choose aggregation = "exact-svd" or "zero-pad", or let the edge hold the whole base (mode = "local")',
                )  # fmt: skip

    def put(self, name: str, adapter: ModuleAdapter, pair: LowRankPair) -> LowRankPair:
        """Train a pair beside a module."""
        if self.remote_blocks is not None and self._is_remote(name, adapter):
            self.remote_blocks.adapters[name] = pair
            return pair
        return self._replace(name, adapted(self._on_frozen_delta(name, self._original(name, adapter)), pair))

    def put_full_weights(
        self, name: str, change: FullWeightDelta, change_OI: nn.Parameter, bias_O: nn.Parameter | None = None
    ) -> FullWeightLinear:
        """Train the full weight of a module.

        Raises: AdapterFitError where it is quantized.
        """
        layer = changed(name, self._original(name, change), change_OI, bias_O)
        self._replace(name, self._on_frozen_delta(name, layer))
        return layer

    def put_killed(self, name: str, adapter: ModuleAdapter, pair: LowRankPair, how: Literal["offload", "merge"]) -> None:
        """Evaluate a frozen pair beside a module, or merge it into a copy of the module."""
        if self.remote_blocks is not None and self._is_remote(name, adapter):
            self.remote_blocks.killed[name], self.remote_blocks.merges = pair, how == "merge"
            return
        original = self._original(name, adapter)
        if how == "merge":
            self._replace(name, self._on_frozen_delta(name, merged(name, original, pair)))
        else:
            self._replace(name, adapted(self._on_frozen_delta(name, original), pair))

    def put_rest_of_frozen_delta(self) -> None:
        """Evaluate the frozen delta where no adapter was put on the module."""
        for name, adapter in self._frozen_delta.modules.items():
            if name not in self._originals:
                self._replace(name, self._on_frozen_delta(name, self._original(name, adapter)))

    def clear(self) -> None:
        """Put every module back."""
        if self.remote_blocks is not None:
            self.remote_blocks.adapters.clear()
            self.remote_blocks.killed.clear()
            self.remote_blocks.merges = False
        for name, module in self._originals.items():
            self.model.set_submodule(name, module)

    def _is_remote(self, name: str, adapter: ModuleAdapter) -> bool:
        return self.remote_blocks is not None and self.remote_blocks.sizes.get(name) == adapter.size

    def _original(self, name: str, adapter: ModuleAdapter | FullWeightDelta) -> nn.Module:
        self._originals[name] = module = _fitting_module(self.model, name, adapter)
        return module

    def _on_frozen_delta(self, name: str, module: nn.Module) -> nn.Module:
        frozen = self._frozen_delta.modules.get(name)
        if frozen is None:
            return module
        # Of another size than the adapter's own, it would fail only in the forward pass.
        _check_size(name, frozen, module_size(self._originals[name]), type(module).__name__)
        return adapted(module, frozen_pair(self._frozen_delta.kind, frozen, self.device))

    def _replace(self, name: str, module: T) -> T:
        self.model.set_submodule(name, module)
        return module


def module_size(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear module of any kind; None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def _fitting_module(model: nn.Module, name: str, adapter: ModuleAdapter | FullWeightDelta) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterFitError(
            "the adapter is for a module that this model does not have",
            got=name, expected="modules such as " + ", ".join(_some_linear_names(model)),
            do="use the adapter with the base model it was trained on",
        ) from None  # fmt: skip
    _check_size(name, adapter, module_size(module), type(module).__name__)
    return module


def _check_size(name: str, adapter: ModuleAdapter | FullWeightDelta, size: tuple[int, int] | None, module: str) -> None:
    if size != adapter.size:
        raise AdapterFitError(
            f"the adapter does not fit {name}", got=f"adapter for (inputs, outputs) = {adapter.size}", expected=f"{size or module}",
            do="use the adapter with the base model it was trained on",
        )  # fmt: skip


def _some_linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module_size(module) is not None][:3]


def _flatten(
    state: AdapterState, cohorts: Sequence[Sequence[str]], device: torch.device
) -> tuple[tuple[Flat, ...], dict[str, tuple[nn.Parameter, ...]]]:
    """Flat parameters with their gradients, and leaf parameters (with gradients) that are views of both."""
    flats, views, trained = [], dict[str, tuple[nn.Parameter, ...]](), state.parts
    for names in cohorts:
        numbers = nn.Parameter(torch.empty(sum(trained[name].num_parameters for name in names), device=device))
        numbers.grad = torch.zeros_like(numbers)
        parts, end = {}, 0
        for name in names:
            start, leaves = end, []
            for tensor in trained[name].tensors:
                leaves.append(_view(numbers, slice(end, end + tensor.numel()), tensor))
                end += tensor.numel()
            views[name], parts[name] = tuple(leaves), slice(start, end)
        flats.append(Flat(numbers, parts))
    return tuple(flats), views


def _view(numbers: nn.Parameter, part: slice, value: Tensor) -> nn.Parameter:
    assert numbers.grad is not None
    leaf = nn.Parameter(numbers.data[part].view_as(value))
    leaf.data.copy_(value)
    leaf.grad = numbers.grad[part].view_as(value)
    return leaf


def merge_into(model: nn.Module, state: AdapterState) -> None:
    """Add the adapters' dense changes to the base's weights, for good (lora only)."""
    for name, adapter in state.modules.items():
        module = _fitting_module(model, name, adapter)
        assert isinstance(module.weight, Tensor)
        module.weight.data.copy_(merged_weight(module, adapter.delta_OI()))
    for name, change in state.full_weights.items():
        module = _fitting_module(model, name, change)
        assert isinstance(module.weight, Tensor)
        module.weight.data.copy_(merged_weight(module, change.change_OI.double()))
        if change.bias_O is not None:
            assert isinstance(module.bias, Tensor)
            module.bias.data.add_(change.bias_O.to(module.bias))
