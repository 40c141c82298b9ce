"""A GGUF file as a model and a tokenizer that can be saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from atoll.base.gguf.header import BROKEN, check_config, check_tensors, read_header, unreadable
from atoll.base.gguf.tokenizer import read_tokenizer
from atoll.base.load import check_vocabulary, quiet
from atoll.base.skeleton.build import build
from atoll.base.weights.checks import check_numbers

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class Dequantized:
    """What a GGUF file comes to."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kinds: tuple[str, ...]
    """How its numbers were stored, most of them first."""


def dequantized(file: Path, dtype: torch.dtype | None = None, tokenizer: str | None = None) -> Dequantized:
    """The model of a file, in `dtype`: by itself the type of most numbers, or bf16 where some are in blocks of fewer bits.

    `tokenizer` is a folder or hub id that has the file's vocabulary, instead of the one that the file describes.

    Raises: UnavailableError without the gguf package; WeightsError, ArchitectureError, TokenizerError for what is not read exactly.
    """
    header = read_header(file)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    wanted = dtype or _DTYPES.get(header.plain_kind or "BF16")
    with quiet():
        try:
            config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
        except (*BROKEN, StrictDataclassError) as problem:
            raise unreadable(file, problem) from None
        check_config(header, config)
        check_tensors(header, build(str(file), config))
        words = read_tokenizer(header, tokenizer)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=wanted, trust_remote_code=False)
        except BROKEN as problem:
            raise unreadable(file, problem) from None
    check_vocabulary(str(file), model, words)
    check_numbers(str(file), model.state_dict().items())
    # Its numbers are plain by now, but the library takes the model for a quantized one, which cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    return Dequantized(model.eval(), words, tuple(header.kinds))
