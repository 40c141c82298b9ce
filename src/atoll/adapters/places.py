"""The linear modules of a model, and what is put in their stead for a while."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.layers import FullWeightLinear, LowRankPair, adapted, changed, frozen_pair
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AdapterFitError
from atoll.remote_blocks import find_placeholder

T = TypeVar("T", bound=nn.Module)


class Places:
    """The modules of a model, and what was put in their stead."""

    def __init__(self, model: nn.Module, frozen_delta: AdapterState | None) -> None:
        self.model, self.remote_blocks = model, find_placeholder(model)
        self.device = next(model.parameters()).device
        self._frozen_delta = frozen_delta or AdapterState("lora", {})
        self._originals: dict[str, nn.Module] = {}
        for name, adapter in self._frozen_delta.modules.items():
            if self.is_remote(name, adapter):
                raise AdapterFitError(
                    "a module that runs in a host has a frozen delta", got=name, expected="modules that run here",
                    do='choose aggregation = "exact-svd" or "zero-pad", or let the edge hold the whole base (mode = "local")',
                )  # fmt: skip

    def put(self, name: str, adapter: ModuleAdapter, pair: LowRankPair) -> LowRankPair:
        """Train a pair beside a module."""
        if self.remote_blocks is not None and self.is_remote(name, adapter):
            self.remote_blocks.adapters[name] = pair
            return pair
        return self.replace(name, adapted(self.on_frozen_delta(name, self.original(name, adapter)), pair))

    def put_full_weights(
        self, name: str, change: FullWeightDelta, change_OI: nn.Parameter, bias_O: nn.Parameter | None = None
    ) -> FullWeightLinear:
        """Train the full weight of a module.

        Raises: AdapterFitError where it is quantized.
        """
        layer = changed(name, self.original(name, change), change_OI, bias_O)
        self.replace(name, self.on_frozen_delta(name, layer))
        return layer

    def put_rest_of_frozen_delta(self) -> None:
        """Evaluate the frozen delta where no adapter was put on the module."""
        for name, adapter in self._frozen_delta.modules.items():
            if name not in self._originals:
                self.replace(name, self.on_frozen_delta(name, self.original(name, adapter)))

    def clear(self) -> None:
        """Put every module back."""
        if self.remote_blocks is not None:
            self.remote_blocks.adapters.clear()
            self.remote_blocks.killed.clear()
            self.remote_blocks.merges = False
        for name, module in self._originals.items():
            self.model.set_submodule(name, module)

    def is_remote(self, name: str, adapter: ModuleAdapter) -> bool:
        """Whether a module of this size runs in a host."""
        return self.remote_blocks is not None and self.remote_blocks.sizes.get(name) == adapter.size

    def original(self, name: str, adapter: ModuleAdapter | FullWeightDelta) -> nn.Module:
        """The module as it was, which is remembered."""
        self._originals[name] = module = fitting_module(self.model, name, adapter)
        return module

    def on_frozen_delta(self, name: str, module: nn.Module) -> nn.Module:
        """The module with the frozen delta beside it, where it has one."""
        frozen = self._frozen_delta.modules.get(name)
        if frozen is None:
            return module
        # Of another size than the adapter's own, it would fail only in the forward pass.
        _check_size(name, frozen, _adaptable_size(self._originals[name]), type(module).__name__)
        return adapted(module, frozen_pair(self._frozen_delta.kind, frozen, self.device))

    def replace(self, name: str, module: T) -> T:
        """Put a module in the place of this name."""
        self.model.set_submodule(name, module)
        return module


def module_size(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear module of any kind; None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def _adaptable_size(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module_size(module)


def fitting_module(model: nn.Module, name: str, adapter: ModuleAdapter | FullWeightDelta) -> nn.Module:
    """The module of this name, which must be one that the adapter fits.

    Raises: AdapterFitError.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AdapterFitError(
            "the adapter is for a module that this model does not have",
            got=name, expected="modules such as " + ", ".join(_some_linear_names(model)),
            do="use the adapter with the base model it was trained on",
        ) from None  # fmt: skip
    _check_size(name, adapter, _adaptable_size(module), type(module).__name__)
    return module


def _check_size(name: str, adapter: ModuleAdapter | FullWeightDelta, size: tuple[int, int] | None, module: str) -> None:
    if size != adapter.size:
        raise AdapterFitError(
            f"the adapter does not fit {name}", got=f"adapter for (inputs, outputs) = {adapter.size}", expected=f"{size or module}",
            do="use the adapter with the base model it was trained on",
        )  # fmt: skip


def _some_linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module_size(module) is not None][:3]
