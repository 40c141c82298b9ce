"""Checkpoints that are released quantized: those that the library makes wide again while it loads them, and the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.errors import WeightsError

MADE_WIDE = ("fp8", "mxfp4")
"""Methods that transformers undoes on any machine, as for DeepSeek-V3 and gpt-oss."""


def is_released_quantized(config: Mapping[str, Any], source: str) -> bool:
    """Whether config.json speaks of quantized weights, which are made wide when they are loaded.

    Raises: WeightsError for a method that is not undone.
    """
    found = config.get("quantization_config")
    if found is None:
        return False
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if method not in MADE_WIDE:
        raise WeightsError(
            "the model's weights are quantized already", where=source, got=f"quantization_config with quant_method = {method!r}",
            expected=f"weights in fp32, fp16 or bf16, or in {' or '.join(MADE_WIDE)}, which are made wide again as they are read",
            do="use the model as it was before quantization; [model] quantize sets the bits",
        )  # fmt: skip
    return True


def made_wide(config: Any, source: str, asked: object) -> Any | None:
    """What from_pretrained is asked for, so that quantized weights become wide; None where they are not quantized.

    Raises: WeightsError for a method that is not undone, or where they are `asked` to be kept in fewer bits once more.
    """
    about: Any = getattr(config, "quantization_config", None)
    about = about if about is None or isinstance(about, Mapping) else about.to_dict()
    if not is_released_quantized({"quantization_config": about}, source):
        return None
    if asked is not None:
        raise not_twice(source, "[model] quantize")
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    return FineGrainedFP8Config(dequantize=True) if about["quant_method"] == "fp8" else Mxfp4Config(dequantize=True)


def not_twice(source: str, what: str) -> WeightsError:
    """What is said where only weights that are stored wide can be used."""
    return WeightsError(
        "the model's weights are released quantized, and can be made wide only as a whole", where=source, got=f"{what} beside them",
        expected="weights in fp32, fp16 or bf16",
        do='write them wide once: AutoModelForCausalLM.from_pretrained(FOLDER, dtype="bfloat16").save_pretrained(NEW_FOLDER), on a '
        "machine with room for it",
    )  # fmt: skip
