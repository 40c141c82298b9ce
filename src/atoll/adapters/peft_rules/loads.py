"""Whether PEFT loads an adapter as it is meant, asked of PEFT itself, on a model without weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from atoll.errors import AdapterFitError

Pair = tuple[int, int, int, float]
"""Rank, inputs, outputs and scaling."""


def check_loads(config: Mapping[str, Any], pairs: Mapping[str, Pair], skeleton: nn.Module) -> None:
    """Whether PEFT makes exactly these pairs of an adapter_config.json; `skeleton` is a model on the device "meta", and is used up.

    Raises: AdapterFitError.
    """
    # Imported here, because it takes seconds.
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    asked = {key: value for key, value in config.items() if key != "peft_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: Any = get_peft_model(skeleton, LoraConfig(**asked), low_cpu_mem_usage=True)
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError) as problem:
            raise _unloadable(str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__) from None
    found: dict[str, Pair] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.r:
            sizes: Any = module.in_features, module.out_features
            found[name] = (module.r["default"], *sizes, module.scaling["default"])
    wrong = sorted(found.keys() ^ pairs.keys())
    wrong += [name for name in found.keys() & pairs.keys() if not _agree(found[name], pairs[name])]
    if wrong:
        raise _unloadable(f"{wrong[0]}: {found.get(wrong[0], 'no pair')}, where {pairs.get(wrong[0], 'none')} is meant")


def _agree(one: Pair, other: Pair) -> bool:
    return one[:3] == other[:3] and abs(one[3] - other[3]) <= 1e-6 * abs(other[3])


def _unloadable(got: str) -> AdapterFitError:
    return AdapterFitError(
        "PEFT would not load what this run trains", where="[adapter] targets", got=got, expected="modules that PEFT puts a LoRA pair on",
        do="name other modules in targets; `atoll plan` lists those there are",
    )  # fmt: skip
