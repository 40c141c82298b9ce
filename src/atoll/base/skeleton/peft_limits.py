"""Projections whose adapters PEFT does not load as they are, so that nobody trains what nobody else can use."""

from __future__ import annotations

from peft.utils import transformers_weight_conversion as conversion

_STATE_SPACE = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Types whose kernels read the weight of `out_proj` past the module.

Source: peft 0.21.2, tuners/tuners_utils.py, _check_lora_target_modules_mamba.
"""


def unloadable_names(model_type: str) -> frozenset[str]:
    """Last names of projections of a model type that must have no adapter.

    In families whose experts were modules before they became one tensor, PEFT takes a target of these names for the experts, also where it
    is a shared expert's or a dense block's.

    Source: peft 0.21.2, utils/transformers_weight_conversion.py, _convert_peft_config_moe.
    """
    if model_type in _STATE_SPACE:
        return frozenset({"out_proj"})
    pattern = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type, "")
    fused = getattr(conversion, "_MOE_FUSED_TARGETS", {}).get(pattern)
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING[pattern]) if fused else frozenset()
