"""What a base is beside its weights: the settings of config.json that decide what they compute, and the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

_INCIDENTAL = frozenset({
    "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map", "use_cache", "quantization_config", "id2label", "label2id",
    "problem_type", "initializer_range", "return_dict", "output_attentions", "output_hidden_states",
})  # fmt: skip
"""What a model computes the same with, or what its weights and labels show by themselves."""


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is in a configuration, in JSON's types, without what changes no logits."""
    # What is infinite has no number in files of runs.
    found: dict[str, Any] = json.loads(json.dumps(values, default=str), parse_constant=str)
    return _without_incidental(found)


def settings_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of the settings."""
    return hashlib.sha256(json.dumps(settings_of(values), sort_keys=True).encode()).hexdigest()


def other_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Settings that both have and that differ, as "key = now, where it was before"; other versions of the library have others beside."""
    found = list[str]()
    for key in sorted(before.keys() & now.keys()):
        was, has = before[key], now[key]
        if isinstance(was, Mapping) and isinstance(has, Mapping):
            found += other_settings(was, has, f"{path}{key}.")
        elif was != has:
            found.append(f"{path}{key} = {json.dumps(has)[:80]}, where it was {json.dumps(was)[:80]}")
    return found


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that decides which ids a text becomes."""
    parts: dict[str, Any] = {"special": sorted(tokenizer.all_special_ids), "vocabulary": sorted(tokenizer.get_vocab().items())}
    if tokenizer.is_fast:
        # Truncation and padding are settings of the last call, not of the tokenizer.
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        parts["rules"] = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _without_incidental(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_incidental(value) if isinstance(value, dict) else value
        for key, value in values.items() if value is not None and key not in _INCIDENTAL and not key.startswith("_")
    }  # fmt: skip
