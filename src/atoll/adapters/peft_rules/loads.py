"""Whether PEFT loads an adapter as it is meant, asked of PEFT itself, on a model without weights."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Pair = tuple[int, int, int, float]
"""Rank, inputs, outputs and scaling."""


def unlike(config: Mapping[str, Any], pairs: Mapping[str, Pair], skeleton: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    """Where PEFT makes other pairs of an adapter_config.json than these: what, and the last names of modules that are as they should be.

    `skeleton` is a model on the device "meta", and is used up.
    """
    # Imported here, because it takes seconds.
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    asked = {key: value for key, value in config.items() if key in known and key != "peft_type"}
    last_names = dict.fromkeys(name.rpartition(".")[2] for name in pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Not by low_cpu_mem_usage: for as long, it sends new parameters of all threads to "meta", those of a host's sessions, too.
            with torch.device("meta"):
                model: Any = get_peft_model(skeleton, LoraConfig(**asked))
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError) as problem:
            got = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            # It mostly says which one it was.
            return got, tuple(name for name in last_names if f"'{name}'" not in got)
    found: dict[str, Pair] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.r:
            sizes: Any = module.in_features, module.out_features
            found[name] = (module.r["default"], *sizes, module.scaling["default"])
    wrong = sorted(found.keys() ^ pairs.keys())
    wrong += [name for name in found.keys() & pairs.keys() if not _agree(found[name], pairs[name])]
    if not wrong:
        return None
    bad = {name.rpartition(".")[2] for name in wrong}
    got = f"{wrong[0]}: {found.get(wrong[0], 'no pair')}, where {pairs.get(wrong[0], 'none')} is meant"
    return got, tuple(name for name in last_names if name not in bad)


def _agree(one: Pair, other: Pair) -> bool:
    return one[:3] == other[:3] and abs(one[3] - other[3]) <= 1e-6 * abs(other[3])
