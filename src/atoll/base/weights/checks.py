"""Whether the weights in the files are the weights in memory: none left over, all of them numbers, and one head at most."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from atoll.errors import WeightsError

# What old checkpoints keep beside the parameters: causal masks, positions and rotary tables, made anew when a model is loaded.
BUFFER = re.compile(r".*(\.attn\.bias|\.masked_bias|\.attention\.bias|rotary_emb\.inv_freq|embeddings\.position_ids)")


def check_all_taken(source: str, unexpected: Collection[str], may_stay: tuple[str, ...] = ()) -> None:
    """Whether tensors of the files are left over, beside those that the library knows to be needless and those whose names begin so.

    Raises: WeightsError.
    """
    left = sorted(name for name in unexpected if not BUFFER.fullmatch(name) and not (may_stay and name.startswith(may_stay)))
    if left:
        raise WeightsError(
            "the files hold weights that the model does not take", where=source,
            got=", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else ""),
            expected="weights of the model that config.json describes, and no others",
            do="give config.json and weights of one model; weights that nothing needs are left out by saving it anew: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        )  # fmt: skip


def check_types(source: str, types: Iterable[tuple[str, str, int]]) -> None:
    """Whether the files' weights, by name, type there and number of dimensions, are no whole numbers, which the library would take as they
    are, without the scales that belong to them.

    Raises: WeightsError.
    """
    found = [f"{name} as {kind}" for name, kind, rank in types if rank > 1 and kind[0] in "IU" and not BUFFER.fullmatch(name)]
    if found:
        raise WeightsError(
            "the files hold whole numbers in place of weights", where=source, got=", ".join(found[:3]),
            expected="weights in fp32, fp16 or bf16, or a quantization_config in config.json that says how they were quantized",
            do="use the model as it was before quantization; [model] quantize sets the bits",
        )  # fmt: skip


def check_one_head(source: str, model: PreTrainedModel) -> None:
    """Whether embedding and head are one in the files, too, where config.json says that they are; the library takes both as they are.

    Raises: WeightsError.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or head is None or head.weight is embedding.weight:
        return
    if head.weight.shape != embedding.weight.shape or not torch.equal(head.weight, embedding.weight):
        raise WeightsError(
            "the head contradicts config.json", where=source, got="a head in the weights that is not the embedding",
            expected="equal weights, or one of them, as tie_word_embeddings = true says",
            do="write tie_word_embeddings = false into config.json if the head was trained by itself; else take it out of the weights",
        )  # fmt: skip


def check_numbers(source: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Whether all weights are numbers.

    Raises: WeightsError.
    """
    for name, tensor in tensors:
        # The sum is a number where all are: one pass, and no memory.
        if tensor.is_floating_point() and not tensor.is_meta and not _is_finite(tensor):
            raise WeightsError(
                "the weights hold what is no number", where=source, got=f"NaN or infinity in {name}", expected="finite weights",
                do="copy or download the weights again; a model that was broken in training needs an earlier checkpoint",
            )  # fmt: skip


def stored_tensors(files: Iterable[Path]) -> Iterable[tuple[str, Tensor]]:
    """All tensors of these files, one after the other."""
    for file in files:
        with safe_open(file, framework="pt", backend="pread") as weights:
            for name in weights.keys():  # noqa: SIM118  no mapping
                yield name, weights.get_tensor(name)


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    return bool(torch.isfinite(wide.sum(dtype=torch.float32))) or bool(torch.isfinite(wide).all())

