"""New adapters, initialised as PEFT does: the change they make is zero."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.state import AdapterState, Kind, ModuleAdapter
from atoll.seeding import stream


def fresh_adapters(
    kind: Kind, sizes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], alpha: float, seed: int, embeddings: Collection[str] = ()
) -> AdapterState:
    """A state for the modules in `ranks`: `down` uniform in +-1/sqrt(inputs), `up` zero, scaling alpha / rank.

    Of `embeddings` `down` is zero and `up` normal: of its rows only those of tokens that are seen ever change.

    Every module has a random stream of its own, so that its start does not depend on which other modules are adapted.

    Shapes: sizes are (inputs, outputs) by module name.
    """
    modules = {}
    for name, rank in ranks.items():
        num_inputs, num_outputs = sizes[name]
        generator = torch.Generator().manual_seed(stream(seed, f"adapter/{name}"))
        down = (torch.rand(rank, num_inputs, generator=generator) * 2 - 1) / num_inputs**0.5
        up = torch.zeros(num_outputs, rank)
        if name in embeddings:
            down, up = torch.zeros(rank, num_inputs), torch.randn(num_outputs, rank, generator=generator)
        modules[name] = ModuleAdapter(down, up, alpha / rank)
    return AdapterState(kind, modules)


def fresh_full_weights(sizes: Mapping[str, tuple[int, int]], names: Iterable[str]) -> AdapterState:
    """A state in which the full weights of these modules are trained, and nothing has changed yet; their biases are not trained.

    Shapes: sizes are (inputs, outputs) by module name.
    """
    return AdapterState("lora", {}, {name: FullWeightDelta(torch.zeros(sizes[name][1], sizes[name][0])) for name in names})


def head_state(head: Mapping[str, tuple[torch.Tensor, ...]]) -> AdapterState:
    """A state in which the full weights of these modules alone are trained, from these values (and biases) on."""
    return AdapterState("lora", {}, {name: FullWeightDelta(*tensors) for name, tensors in head.items()})
