"""Bases of real size without weights: sizes to plan with, and models to make where they are wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False}
BASES: dict[str, dict[str, Any]] = {
    "llama3-8b": _COMMON | {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "qwen3-4b": _COMMON | {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True,
    },
    "small": _COMMON | {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 1024,
    },
}  # fmt: skip


def write(name: str, folder: Path) -> PretrainedConfig:
    """A model folder whose weights are a hole in the disk: enough to read its shapes. Returns its config."""
    config: PretrainedConfig = AutoConfig.for_model(**BASES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    header, end = dict[str, Any](), 0
    for tensor, parameter in model.named_parameters():
        header[tensor] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + 2 * parameter.numel()]}
        end += 2 * parameter.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return config
