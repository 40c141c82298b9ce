"""Which modules PEFT gives a pair, by an adapter_config.json."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

_CHOOSES = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def targeted(config: Mapping[str, Any], names: Collection[str], model: nn.Module | None = None) -> set[str]:
    """Those of these names of modules that PEFT would adapt; with "all-linear" and no model, all.

    Raises: ValueError where PEFT does.
    """
    targets = config.get("target_modules")
    if isinstance(targets, list) and not any(config.get(key) for key in _CHOOSES):
        wanted = set(targets)
        return {name for name in names if any(end in wanted for end in _ends(name))}
    if targets == "all-linear" and model is None:
        return set(names)
    # Imported here, because it takes seconds, and what Atoll writes needs none of it.
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            asked: Any = LoraConfig(**{key: value for key, value in config.items() if key in known and key != "peft_type"})
            if model is not None:
                asked = _maybe_include_all_linear_layers(asked, model)
            found = {name: check_target_module_exists(asked, name) for name in names}
        except (TypeError, AttributeError, UnboundLocalError, ImportError) as problem:
            raise ValueError(f"{type(problem).__name__}: {problem}") from None
    return {name for name, match in found.items() if match}


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
