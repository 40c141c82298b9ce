"""The sizes of a base as transformers builds it, for every family whose checkpoints do not tell them: those with experts, say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from atoll.base.blocks import blocks_path, is_projection, projections_that_run, sizes_of
from atoll.base.families import FAMILIES, guess_kind
from atoll.base.headers import Headers
from atoll.base.load import load_causal_config, quiet
from atoll.base.skeleton.build import build, is_plain
from atoll.base.skeleton.peft_limits import unloadable_names
from atoll.base.skeleton.released import is_released_quantized
from atoll.base.skeleton.stored_names import StoredNames
from atoll.errors import WeightsError
from atoll.shapes import BaseShapes, ModuleShape
from atoll.units import counted

_NAMED_AS_EXPERTS = re.compile(r".*(expert|router|\bgate\b|moe).*")


def sizes_of_model(headers: Headers) -> BaseShapes:
    """Sizes by the model on the meta device, into which the checkpoint's tensors must fit.

    Raises: BaseFolderError, ArchitectureError, WeightsError.
    """
    with quiet():
        config = load_causal_config(headers.source)
        model = build(headers.source, config)
    if not is_released_quantized(headers.config, headers.source):
        _check_fit(headers, model)
    path, text = blocks_path(model), config.get_text_config()
    blocks: Any = model.get_submodule(path)
    modules, experts = tuple(_modules(path, model)), tuple(_experts(path, blocks))
    d_model, head = int(text.hidden_size), model.get_output_embeddings()
    num_heads = _largest(getattr(text, "num_attention_heads", None))
    family = FAMILIES.get(text.model_type)
    return BaseShapes(
        model_type=config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        modules=modules,
        d_model=d_model,
        vocab_size=int(text.vocab_size),
        num_blocks=len(blocks),
        max_positions=_largest(getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))) or None,
        tied_head=head is not None and head.weight is model.get_input_embeddings().weight,
        stored_bytes_per_weight=sum(header.num_bytes for header in headers.tensors.values())
        / max(1, sum(prod(header.shape) for header in headers.tensors.values())),
        num_heads=num_heads,
        attention_width=num_heads * (_largest(getattr(text, "head_dim", None)) or d_model // max(1, num_heads)),
        keeps_scores=family.keeps_scores if family is not None else bool(num_heads),
        without_adapter=(*experts, *(module.name for module in modules if not module.takes_adapter)),
        num_wide=sum(model.get_parameter(name).numel() for name in experts),
        outside=tuple(_outside(model, len(blocks))),
    )


def _outside(model: PreTrainedModel, num_blocks: int) -> Iterator[ModuleShape]:
    """Embedding and head, each where it is a module that a pair can be put beside."""
    names = {module: name for name, module in model.named_modules()}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if isinstance(embedding, nn.Embedding) and embedding in names:
        rows, width = embedding.num_embeddings, embedding.embedding_dim
        yield ModuleShape(names[embedding], rows, width, "other", -1, outside="embedding")
    if type(head) is nn.Linear and head in names:
        yield ModuleShape(names[head], head.in_features, head.out_features, "other", num_blocks, outside="head")


def _modules(path: str, model: PreTrainedModel) -> Iterator[ModuleShape]:
    """Linear projections inside the blocks, in the model's order."""
    runs, unloadable = projections_that_run(model), unloadable_names(model.config.model_type)
    for name, module in model.get_submodule(path).named_modules():
        if is_projection(module):
            block, _, inner = name.partition(".")
            full = f"{path}.{name}"
            own = runs is None or full in runs
            takes, narrows = own and name.rpartition(".")[2] not in unloadable, own and is_plain(module)
            yield ModuleShape(full, *sizes_of(module), guess_kind(inner), int(block), takes_adapter=takes, narrows=narrows)


def _experts(path: str, blocks: nn.Module) -> Iterator[str]:
    """Weights of blocks that are matrices of no linear module: experts that are one tensor, and routers that hold their weight bare."""
    for name, module in blocks.named_modules():
        if is_projection(module) or isinstance(module, nn.Embedding) or type(module).__name__.startswith("Conv"):
            continue
        for last, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and min(parameter.shape) > 1 and _NAMED_AS_EXPERTS.fullmatch(name.partition(".")[2].lower()):
                yield f"{path}.{name}.{last}"


def _check_fit(headers: Headers, model: PreTrainedModel) -> None:
    names, tensors = StoredNames(model), model.state_dict()
    missing = names.missing(headers.tensors, model.all_tied_weights_keys)
    kept = [name for name in missing if name in dict(model.named_parameters())]
    wrong = [
        stored for stored, header in headers.tensors.items()
        if not names.converted(stored) and any(tuple(tensors[name].shape) != header.shape for name in names.of(stored))
    ]  # fmt: skip
    if kept or wrong:
        raise WeightsError(
            "the weights do not fit config.json", where=headers.source,
            got=f"{counted(len(kept), 'tensor')} missing, {len(wrong)} of another shape: " + ", ".join([*kept, *wrong][:3]),
            expected=f"the tensors of a {type(model).__name__} of these sizes", do="copy config.json and the weights from the same model",
        )  # fmt: skip


def _largest(value: Any) -> int:
    """A size that a configuration has for the whole, or for each block."""
    sizes = value if isinstance(value, list | tuple) else [value]
    return max((size for size in sizes if isinstance(size, int)), default=0)
