"""What becomes of each field of PEFT's LoraConfig when an adapter folder is read: applied as PEFT does, without effect, or refused.

A field that is not in the table is refused unless it is off, so that what a later PEFT adds is never passed over.

Source: peft 0.21, LoraConfig and LoraLayer.update_layer; tests/adapters/test_peft_fields.py holds each line against PEFT's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_LARGEST = 1e9


@dataclass(frozen=True, slots=True)
class Field:
    """What is accepted of one field, in words and as a test of a value; `note` says what becomes of it."""

    accepted: str
    is_accepted: Callable[[Any], bool]
    note: str


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < _LARGEST


def _is_count(value: object) -> bool:
    return _is_number(value) and isinstance(value, int) and value > 0


def _is_names(value: object) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_layers(value: object) -> bool:
    return value is None or all(type(number) is int for number in (value if isinstance(value, list) else [value]))


def _is_pattern_of(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(is_value(one) for one in value.values()))


def is_off(value: object) -> bool:
    """Whether a switch that nobody set."""
    return value is None or value is False or value in ("", [], {})


def _exact(accepted: str, is_accepted: Callable[[Any], bool]) -> Field:
    return Field(accepted, is_accepted, "applied as PEFT does")


_NAMES = _exact("names, a regular expression, or nothing", _is_names)
_NO_EFFECT = Field("anything", lambda value: True, "no effect on what the adapter computes")
_OFF = Field("off", is_off, "refused")

_INITS = ("gaussian", "eva", "orthogonal")
"""Ways to start, beside true and false, that leave the base as it is when PEFT loads the adapter.

The others change it, or need what is not in the folder."""
TASKS = (None, "CAUSAL_LM", "SEQ_CLS")

FIELDS: Mapping[str, Field] = {
    "peft_type": _exact("LORA", lambda value: value == "LORA"),
    "task_type": _exact("CAUSAL_LM, SEQ_CLS or nothing", lambda value: value in TASKS),
    "r": _exact("a whole number above 0", _is_count),
    "lora_alpha": _exact("a number other than 0", _is_number),
    "use_rslora": _exact("true or false", lambda value: value is None or isinstance(value, bool)),
    "rank_pattern": _exact("whole numbers above 0 by pattern", _is_pattern_of(_is_count)),
    "alpha_pattern": _exact("numbers other than 0 by pattern", _is_pattern_of(_is_number)),
    "target_modules": _exact("names, or a regular expression", lambda value: bool(value) and _is_names(value)),
    "exclude_modules": _NAMES,
    "layers_to_transform": _exact("numbers of blocks, or nothing", _is_layers),
    "layers_pattern": _NAMES,
    "init_lora_weights": _exact("true, false, " + ", ".join(_INITS), lambda value: value in (None, *_INITS) or isinstance(value, bool)),
    "bias": Field('"none"', lambda value: value in (None, "none"), "refused"),
    "modules_to_save": Field("off; a classifier's head where task_type is SEQ_CLS", _is_names, "refused"),
    "lora_dropout": _NO_EFFECT,
    "fan_in_fan_out": _NO_EFFECT,
    "inference_mode": _NO_EFFECT,
    "auto_mapping": _NO_EFFECT,
    "peft_version": _NO_EFFECT,
    "base_model_name_or_path": _NO_EFFECT,
    "revision": _NO_EFFECT,
    "runtime_config": _NO_EFFECT,
    "megatron_core": _NO_EFFECT,
    "qalora_group_size": _NO_EFFECT,
    "loftq_config": _NO_EFFECT,
    "eva_config": _NO_EFFECT,
    "corda_config": _NO_EFFECT,
    "lora_ga_config": _NO_EFFECT,
    "megatron_config": _OFF,
    "trainable_token_indices": _OFF,
    "use_dora": _OFF,
    "velora_config": _OFF,
    "alora_invocation_tokens": _OFF,
    "use_qalora": _OFF,
    "monteclora_config": _OFF,
    "layer_replication": _OFF,
    "lora_bias": _OFF,
    "target_parameters": _OFF,
    "use_bdlora": _OFF,
    "arrow_config": _OFF,
    "kasa_config": _OFF,
    "ensure_weight_tying": _OFF,
}
"""By name. What PEFT makes of `fan_in_fan_out` follows from the module's class, whatever the file says; options of a start
(`eva_config` and its like) are looked at only where `init_lora_weights` names it."""


def refused_fields(config: Mapping[str, Any]) -> dict[str, str]:
    """What is accepted of each field of an adapter_config.json that would not be applied exactly; empty: of none."""
    found = {
        name: (FIELDS[name].accepted if name in FIELDS else "no such field, or off")
        for name, value in config.items()
        if not (FIELDS[name].is_accepted(value) if name in FIELDS else is_off(value))
    }
    # Of a classifier they stand for what the base has as well, and replace it.
    if not is_off(config.get("modules_to_save")) and config.get("task_type") != "SEQ_CLS":
        found["modules_to_save"] = FIELDS["modules_to_save"].accepted
    return found


def table() -> str:
    """The page's table of all fields, in Markdown."""
    lines = ["| field | accepted | what becomes of it |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {field.accepted} | {_what(field)} |" for name, field in FIELDS.items())]) + "\n"


def _what(field: Field) -> str:
    return "anything else is refused" if field.note == "refused" else field.note
