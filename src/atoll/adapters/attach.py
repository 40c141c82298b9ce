"""Put adapters on a model and take them off again; the base's own modules and weights are never changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.killed import Killed, kill
from atoll.adapters.layers import FullWeightLinear, LowRankPair, merged_weight
from atoll.adapters.places import Places, fitting_module
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.remote_blocks import RemoteBlocksPlaceholder


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
    remote_blocks: RemoteBlocksPlaceholder | None = None
    """Where some of them are in another process."""

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
    places = Places(model, frozen_delta)
    layers: dict[str, LowRankPair] = {}
    try:
        for name in trained:
            adapter = state.modules[name]
            down_RI, up_OR = views[name]
            layers[name] = places.put(name, adapter, LowRankPair(state.kind, down_RI, up_OR, adapter.scaling, dropout).eval())
        full_weights = {name: places.put_full_weights(name, change, *views[name]) for name, change in state.full_weights.items()}
        kill(places, state, killed)
        places.put_rest_of_frozen_delta()
        yield Attached(flats, layers, state, full_weights, places.remote_blocks)
    finally:
        places.clear()


def _part_from_twin(model: PreTrainedModel, module: nn.Module) -> None:
    twins = [other for other in model.modules() if other is not module and getattr(other, "weight", None) is module.weight]
    if twins:
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


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


def merge_into(model: PreTrainedModel, state: AdapterState) -> None:
    """Add the adapters' dense changes to the base's weights, for good (lora only).

    An embedding that is the head, too, and of which only one has an adapter, gets a weight of its own first, and config.json says so.
    """
    for name, adapter in state.modules.items():
        module = fitting_module(model, name, adapter)
        assert isinstance(module.weight, Tensor)
        _part_from_twin(model, module)
        module.weight.data.copy_(merged_weight(module, adapter.delta_OI()))
    for name, change in state.full_weights.items():
        module = fitting_module(model, name, change)
        assert isinstance(module.weight, Tensor)
        module.weight.data.copy_(merged_weight(module, change.change_OI.double()))
        if change.bias_O is not None:
            assert isinstance(module.bias, Tensor)
            module.bias.data.add_(change.bias_O.to(module.bias))
