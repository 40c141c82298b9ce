"""The decoder blocks of a model: where they are, what takes the place of a missing one, and which of their projections share an input.

Shape suffixes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from atoll.base.families import FAMILIES
from atoll.base.skeleton.build import body_of, text_path_of
from atoll.errors import ArchitectureError
from atoll.remote_blocks import RemoteBlocksPlaceholder

_TOKENS = 4
_ORDINARY = ("FalconLinear",)
"""Projections of a class of their family's own that compute W x + b all the same."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What one forward pass through the blocks does."""

    groups: tuple[tuple[str, ...], ...]
    """Full names of the projections that read one and the same tensor, in the order in which they run."""
    returns_tuple: bool
    """Whether a block returns (hidden states, something else) rather than hidden states alone."""


class Skip(nn.Module):
    """A block that returns its hidden states as they came, in the form that the family's blocks have."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        hear_hidden_states_only(self)

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        """The hidden states.

        Shapes: (B, T, D) in and out.
        """
        return (hidden_states, None) if self.returns_tuple else hidden_states


def hear_hidden_states_only(block: nn.Module) -> None:
    """Let a placeholder's forward have the hidden states as its only argument, whatever else the family gives to its blocks."""
    block.register_forward_pre_hook(_first_argument, with_kwargs=True)


def _first_argument(_block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (arguments[0] if arguments else named["hidden_states"],), {}


def counts_in_cache(block: nn.Module, number: int) -> RemovableHandle:
    """Let a block that is elsewhere count the positions which pass it in its own layer of a cache: the library asks any layer how many
    there were. The handle ends it.
    """
    return block.register_forward_pre_hook(partial(_count_positions, number), prepend=True, with_kwargs=True)


def _count_positions(number: int, _block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    cache = next((value for value in (*arguments, *named.values()) if isinstance(value, Cache)), None)
    if cache is not None:
        h_BTD: Tensor = arguments[0] if arguments else named["hidden_states"]
        mark = h_BTD.new_zeros(h_BTD.shape[0], 1, h_BTD.shape[1], 1)
        cache.update(mark, mark, number)


def keeps_keys(model: PreTrainedModel) -> bool:
    """Whether each block needs of earlier positions nothing but keys and values of its own, in a plain layer of the library's cache.

    Not so where it has a state, or reads what another block keeps: then blocks of one model cannot keep it in two places.
    """
    blocks: Any = model.get_submodule(blocks_path(model))
    config: Any = model.config.get_text_config(decoder=True)
    known: Any = model
    takes_cache = {"past_key_values", "attention_mask"} <= signature(body_of(model).forward).parameters.keys()
    if known._is_stateful or not known._supports_default_dynamic_cache() or not takes_cache:
        return False
    layers = DynamicCache(config=config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    own = (_numbers(block) == {number} or is_elsewhere(block) for number, block in enumerate(blocks))
    return plain and len(layers) == len(blocks) and all(own)


def is_elsewhere(block: nn.Module) -> bool:
    """Whether something only takes the place of a block."""
    return isinstance(block, Skip | RemoteBlocksPlaceholder)


def _numbers(block: nn.Module) -> set[int]:
    """By which the parts of a block know their layer of a cache."""
    found = (getattr(module, name, None) for module in block.modules() for name in ("layer_idx", "layer_id"))
    return {number for number in found if number is not None}


def blocks_path(model: PreTrainedModel) -> str:
    """Path of the list of decoder blocks in a causal language model, "model.layers".

    Raises: ArchitectureError where the model has no list of blocks.
    """
    family = FAMILIES.get(model.config.model_type)
    # Where the text model is a part of the whole, the others' blocks are not meant: of what sees images, say.
    text = text_path_of(model)
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and f"{name}.".startswith(text)}
    if family is not None and family.blocks in lists:
        return family.blocks
    # A list inside another one holds parts of a block, such as experts, of which there may be more than blocks.
    outermost = {name: length for name, length in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not any(outermost.values()):
        raise _unknown(model, "no list of decoder blocks")
    return max(outermost, key=lambda name: outermost[name])


@torch.no_grad()
def trace(model: PreTrainedModel) -> Trace:
    """Run one tiny forward pass, also of a model without weights (on the meta device), and leave the model as it was.

    Raises: ArchitectureError where the pass fails or runs a projection twice.
    """
    inputs, output = _what_runs(model)
    groups = _group(inputs)
    names = [name for group in groups for name in group]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _unknown(model, f"{twice[0]}, which runs twice")
    return Trace(groups, isinstance(output, tuple))


def projections_that_run(model: PreTrainedModel) -> frozenset[str] | None:
    """Full names of the projections whose own forward pass runs; of others the family reads the weight, past what is put beside it.

    None where the pass cannot be run.
    """
    try:
        return frozenset(name for name, _ in _what_runs(model)[0])
    except ArchitectureError:
        return None


@torch.no_grad()
def _what_runs(model: PreTrainedModel) -> tuple[list[tuple[str, Tensor]], Any]:
    """Every call of a projection of the blocks with its input, in order, and what the first block returns."""
    path = blocks_path(model)
    blocks: Any = model.get_submodule(path)
    inputs: list[tuple[str, Tensor]] = []
    outputs: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(_buffers_beside_weights(model))
        stack.enter_context(_fixed_rotation(model))
        stack.enter_context(_experts_passed_by(model))
        for name, module in blocks.named_modules():
            if is_projection(module):
                hook = _reader(f"{path}.{name}", inputs)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.callback(blocks[0].register_forward_hook(lambda _block, _arguments, output: outputs.append(output)).remove)
        _run(model, inputs, outputs)
    if not outputs:
        raise _unknown(model, "blocks that do not run")
    return inputs, outputs[0]


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a linear projection: plain, quantized, or transposed as GPT-2's. A router that answers more than W x is none."""
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, Tensor) and weight.ndim == 2
    of_a_family = type(module).__module__.startswith("transformers.models.") and type(module).__name__ not in _ORDINARY
    return is_matrix and not of_a_family and (hasattr(module, "in_features") or type(module).__name__ == "Conv1D")


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a projection; a 4-bit weight's own shape does not tell them."""
    known: Any = module
    return (known.in_features, known.out_features) if hasattr(module, "in_features") else (known.nx, known.nf)


def _reader(name: str, inputs: list[tuple[str, Tensor]]) -> Any:
    # The tensors are kept, not their ids: an id is used again once its tensor is gone.
    def read(_module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        inputs.append((name, arguments[0] if arguments else next(iter(named.values()))))

    return read


def _group(inputs: list[tuple[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, tensor in inputs:
        if tensor is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = tensor
    return tuple(tuple(group) for group in groups)


def _run(model: PreTrainedModel, inputs: list[tuple[str, Tensor]], outputs: list[Any]) -> None:
    """A forward pass over a few positions.

    On the meta device most families look at values of a mask that they make themselves, so that they need one; OPT and BLOOM cannot take
    this one.
    """
    weight: Any = model.get_input_embeddings().weight
    h_BTD = torch.zeros(1, _TOKENS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    mask = torch.zeros(1, 1, _TOKENS, _TOKENS, dtype=weight.dtype, device=weight.device)
    problem: Exception | None = None
    for options in ({}, {"attention_mask": mask}):
        inputs.clear()
        outputs.clear()
        try:
            body_of(model)(inputs_embeds=h_BTD, use_cache=False, **options)
            return
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as caught:
            problem = caught
    raise _unknown(model, f"a forward pass that fails: {str(problem).strip().splitlines()[0][:120]}") from problem


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without OPT's leaving out of whole blocks."""
    before = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in before:
            module.training = True


@contextmanager
def _buffers_beside_weights(model: nn.Module) -> Iterator[None]:
    """Where weights are on the meta device, buffers too; not where a device map brings weights in as they are needed."""
    real: list[tuple[nn.Module, str, Tensor]] = []
    if not hasattr(model, "hf_device_map") and any(parameter.is_meta for parameter in model.parameters()):
        real = [(m, name, b) for m in model.modules() for name, b in m.named_buffers(recurse=False) if not b.is_meta]
    for module, name, buffer in real:
        setattr(module, name, buffer.to("meta"))
    try:
        yield
    finally:
        for module, name, buffer in real:
            setattr(module, name, buffer)


@contextmanager
def _fixed_rotation(model: nn.Module) -> Iterator[None]:
    """Without rotary tables that a long row changes: they look at positions' values, which the meta device has none of."""
    rotary: list[tuple[Any, str]] = [(m, kind) for m in model.modules() if isinstance(kind := getattr(m, "rope_type", None), str)]
    for module, _ in rotary:
        module.rope_type = "default"
    try:
        yield
    finally:
        for module, kind in rotary:
            module.rope_type = kind


@contextmanager
def _experts_passed_by(model: PreTrainedModel) -> Iterator[None]:
    """Where weights are on the meta device, without the experts' own arithmetic: which tokens go to which expert is in values."""
    experts: list[Any] = [m for m in model.modules() if type(m).__name__.endswith("Experts") and next(m.parameters()).is_meta]
    for module in experts:
        module.forward = _same_shape
    try:
        yield
    finally:
        for module in experts:
            del module.forward


def _same_shape(hidden_states: Tensor, *_: Any) -> Tensor:
    return torch.zeros_like(hidden_states)


def _unknown(model: PreTrainedModel, got: str) -> ArchitectureError:
    return ArchitectureError(
        f"{type(model).__name__} cannot be taken apart into blocks", got=got, expected="decoder blocks that run one after the other",
        do="use another model family for split mode, or train without it",
    )  # fmt: skip
