"""The sizes of a base, from its config.json and the headers of its weights: enough to plan with, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from atoll.base.families import FAMILIES, Family, locate
from atoll.base.headers import Headers, TensorHeader, read_headers
from atoll.base.skeleton.released import is_released_quantized, not_twice
from atoll.embedded import tiny_path
from atoll.errors import ArchitectureError, BaseFolderError, WeightsError
from atoll.shapes import BaseShapes, ModuleShape

__all__ = ["BaseShapes", "read_shapes"]

_HEADS = ("lm_head.weight", "embed_out.weight")
_GENERATES = re.compile(r".*(ForCausalLM|LMHeadModel|ForConditionalGeneration)")
_NOT_A_PROJECTION = re.compile(r".*(embed|norm|\bln_|\bwte\b|\bwpe\b).*")
# What old checkpoints keep beside the parameters: causal masks and rotary tables, made anew when a model is loaded.
_BUFFER = re.compile(r".*(\.attn\.bias|\.masked_bias|\.attention\.bias|rotary_emb\.inv_freq)")


def read_shapes(source: str, num_classes: int | None = None) -> BaseShapes:
    """Shapes of "tiny", of a model folder, or of a hub id; with `num_classes`, of a classifier made of it.

    Raises: BaseFolderError, WeightsError, ArchitectureError.
    """
    headers = read_headers(str(tiny_path()) if source == "tiny" else source)
    model_type = _model_type(headers, classifies=num_classes is not None)
    family = FAMILIES.get(model_type)
    _check_weights(headers, classifies=num_classes is not None)
    weights = {name: header for name, header in headers.tensors.items() if not _BUFFER.fullmatch(name)}
    if family is None or "quantization_config" in headers.config:
        return _by_model(headers)
    modules = _modules(weights, family)
    num_blocks = 1 + max((module.block for module in modules), default=-1)
    d_model = _size(headers, ("hidden_size", "n_embd", "d_model", "dim"))
    num_heads = _size(headers, ("num_attention_heads", "n_head", "num_heads", "n_heads"))
    if not _is_ordinary(headers, family, modules, num_blocks):
        if num_classes is not None:
            raise weights_misfit(headers.source, f"{len(modules)} projections in {num_blocks} blocks", "as many as config.json speaks of")
        return _by_model(headers)
    tied = _is_tied(headers.config, weights, family)
    stored_bytes = sum(header.num_bytes for header in weights.values())
    head = _head(headers, family, num_blocks, num_classes) if num_classes is not None else ()
    return BaseShapes(
        model_type=model_type,
        num_parameters=_num_parameters(weights, tied) if not head else _num_of_classifier(weights, family, head),
        modules=modules,
        d_model=d_model,
        vocab_size=_size(headers, ("vocab_size",)),
        num_blocks=num_blocks,
        max_positions=_first(headers.config, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")),
        tied_head=tied,
        stored_bytes_per_weight=stored_bytes / sum(prod(header.shape) for header in weights.values()),
        num_heads=num_heads,
        attention_width=num_heads * (_first(headers.config, ("head_dim",)) or d_model // num_heads),
        keeps_scores=family.keeps_scores,
        head=head,
        head_biases=bool(head) and not family.causal,
        outside=_outside(headers, family, num_blocks) if num_classes is None else (),
    )


def _outside(headers: Headers, family: Family, num_blocks: int) -> tuple[ModuleShape, ...]:
    """Embedding and head of a model that generates."""
    stored = (f"{family.embedding}.weight", f"{family.embedding.partition('.')[2]}.weight")
    rows = next((headers.tensors[name].shape for name in stored if name in headers.tensors), ())
    if len(rows) != 2:
        return ()
    vocabulary, width = rows
    return (
        ModuleShape(family.embedding, vocabulary, width, "other", -1, outside="embedding"),
        ModuleShape(family.head, width, vocabulary, "other", num_blocks, outside="head"),
    )


def _num_parameters(weights: Mapping[str, TensorHeader], tied: bool) -> int:
    return sum(prod(header.shape) for name, header in weights.items() if not (tied and name in _HEADS))


def _num_of_classifier(weights: Mapping[str, TensorHeader], family: Family, head: tuple[ModuleShape, ...]) -> int:
    """Without what predicts tokens, and what a checkpoint may have of another head; with the head that there will be."""
    others = (*(f"{module.name}." for module in head), f"{family.head}.", "cls.", "pooler.")
    rest = sum(prod(header.shape) for name, header in weights.items() if not name.startswith(others))
    return rest + sum(module.num_weights + module.d_out * (not family.causal) for module in head)


def _head(headers: Headers, family: Family, num_blocks: int, num_classes: int) -> tuple[ModuleShape, ...]:
    """What a classifier has between its blocks and its classes; a pooler that the folder has stays frozen."""
    width = _first(headers.config, ("word_embed_proj_dim",)) or _size(headers, ("hidden_size", "n_embd", "d_model", "dim"))
    head = [ModuleShape(family.classifier, width, num_classes, "other", num_blocks, full_weights=True)]
    if family.pooler is not None:
        trained = not any(f"{name}.weight" in headers.tensors for name in (family.pooler, family.pooler.partition(".")[2]))
        head.insert(0, ModuleShape(family.pooler, width, width, "other", num_blocks, full_weights=trained))
    return tuple(head)


def _model_type(headers: Headers, *, classifies: bool) -> str:
    model_type = headers.config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise BaseFolderError(
            "config.json does not say what kind of model this is", where=headers.source, got="no model_type",
            expected="model_type, such as " + ", ".join(sorted(FAMILIES)[:4]), do="give the folder that save_pretrained wrote",
        )  # fmt: skip
    architectures = headers.config.get("architectures") or []
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    family = FAMILIES.get(model_type)
    if classifies:
        if family is None:
            raise ArchitectureError(
                "it is not known here how this family classifies", where=headers.source, got=f"model_type = {model_type!r}",
                expected="one of " + ", ".join(sorted(FAMILIES)), do='choose another base, or write task = "generate" below [model]',
            )  # fmt: skip
        return model_type
    bare = (family is None or family.causal) and all(name.endswith("Model") for name in names)
    if headers.config.get("is_encoder_decoder") or not (bare or any(_GENERATES.fullmatch(name) for name in names)):
        raise ArchitectureError(
            "the model is not a causal language model", where=headers.source,
            got=f"model_type = {model_type!r}, architectures = {names}",
            expected="a decoder such as llama, mistral, qwen2, qwen3, gemma, gpt2, opt, bloom, gpt_neox",
            do="choose a model that generates text from left to right",
        )  # fmt: skip
    return model_type


def _check_weights(headers: Headers, *, classifies: bool) -> None:
    if is_released_quantized(headers.config, headers.source) and classifies:
        raise not_twice(headers.source, 'task = "classify"')
    if not headers.tensors:
        raise WeightsError(
            "the weight files hold no tensors", where=headers.source, got="0 tensors", expected="the model's weights",
            do="copy or download the model again",
        )  # fmt: skip


def _modules(weights: Mapping[str, TensorHeader], family: Family) -> tuple[ModuleShape, ...]:
    """Two-dimensional weights inside the blocks, sorted by block and by their place in it."""
    found: list[tuple[int, int, ModuleShape]] = []
    for name, header in weights.items():
        if not name.endswith(".weight") or len(header.shape) != 2:
            continue
        place = locate(name.removesuffix(".weight"), family)
        if place is None or _NOT_A_PROJECTION.fullmatch(place[2]):
            continue
        blocks, block, inner = place
        d_out, d_in = header.shape[::-1] if family.transposed else header.shape
        kind, position = family.kind_of(inner), family.position_of(inner)
        found.append((block, position, ModuleShape(f"{blocks}.{block}.{inner}", d_in, d_out, kind, block)))
    return tuple(shape for _, _, shape in sorted(found, key=lambda item: item[:2]))


def weights_misfit(source: str, got: str, expected: str) -> WeightsError:
    """What is said of weights that are not those of config.json."""
    return WeightsError(
        "the weights do not fit config.json", where=source, got=got, expected=expected,
        do="copy config.json and the weights from the same model",
    )  # fmt: skip


def _by_model(headers: Headers) -> BaseShapes:
    # Imported here: it takes seconds, and the families whose checkpoints tell all need none of it.
    from atoll.base.skeleton.sizes import sizes_of_model

    return sizes_of_model(headers)


def _is_ordinary(headers: Headers, family: Family, modules: tuple[ModuleShape, ...], num_blocks: int) -> bool:
    """Whether the checkpoint has the family's modules in every block that config.json speaks of, and no others."""
    declared = _size(headers, ("num_hidden_layers", "n_layer", "num_layers", "n_layers"))
    return num_blocks == declared and len(modules) == (len(family.attention) + len(family.mlp)) * declared


def _is_tied(config: Mapping[str, Any], weights: Mapping[str, TensorHeader], family: Family) -> bool:
    declared = config.get("tie_word_embeddings", family.tied)
    return declared if isinstance(declared, bool) else not any(name in weights for name in _HEADS)


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _size(headers: Headers, keys: tuple[str, ...]) -> int:
    value = _first(headers.config, keys)
    if value is None or value < 1:
        raise BaseFolderError(
            f"config.json has no usable {keys[0]}", where=headers.source, got=repr(headers.config.get(keys[0])),
            expected="a whole number above 0", do="give the config.json that belongs to the weights",
        )  # fmt: skip
    return value
