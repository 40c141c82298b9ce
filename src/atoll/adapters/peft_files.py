"""Adapter folders as Hugging Face PEFT reads and writes them: adapter_config.json and adapter_model.safetensors.

Written here because an AdapterState has no model to ask PEFT with; the tests hold both directions against PEFT itself.
PEFT has no bottleneck adapter: those folders carry peft_type ATOLL_BOTTLENECK and load in Atoll only.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.state import AdapterState, Kind, ModuleAdapter
from atoll.errors import AdapterFolderError
from atoll.parsed import parse_json

CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE = "adapter_config.json", "adapter_model.safetensors", "labels.json"
_PEFT_TYPE: dict[Kind, str] = {"lora": "LORA", "bottleneck": "ATOLL_BOTTLENECK"}
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_SAVED = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<side>weight|bias)")
_SIDES = ("weight", "bias")
# Options of PEFT's LoRA that change what the two matrices mean; each must be absent or off.
_MEANING = ("use_dora", "use_qalora", "modules_to_save", "layer_replication", "trainable_token_indices", "lora_bias", "target_parameters",
            "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config")  # fmt: skip


def save_adapter(
    state: AdapterState, folder: Path, *, base_name: str, transposed: bool = False, head: Collection[str] = (), labels: Sequence[str] = ()
) -> None:
    """Write the state as a PEFT adapter folder; `transposed`: the base keeps weights as (inputs, outputs), as GPT-2 does.

    A full weight becomes a LoRA pair of the full rank, of which one side is the identity: no bit is lost. But the modules of a
    classifier's `head` are saved as they are (modules_to_save), and its labels in a file beside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heads = {name: zip(_SIDES, state.full_weights[name].tensors, strict=False) for name in head}
    tensors = {f"{_PREFIX}{name}.{side}": tensor for name, sides in heads.items() for side, tensor in sides}
    pairs = {name: _pair_of(change) for name, change in state.full_weights.items() if name not in head}
    state = AdapterState(state.kind, {**state.modules, **pairs})
    for name, adapter in state.modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = adapter.down_RI.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = adapter.up_OR.contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = _config_of(state, base_name, transposed)
    if head:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": list(head)}
        named = {"id2label": dict(enumerate(labels))}
        (folder / LABELS_FILE).write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_labels(folder: Path) -> tuple[str, ...]:
    """The labels of a classifier's adapter in their order; empty for another adapter.

    Raises: AdapterFolderError.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return ()
    try:
        named = parse_json(path.read_text(encoding="utf-8"))["id2label"]
        return tuple(str(named[str(number)]) for number in range(len(named)))
    except (ValueError, KeyError, TypeError) as problem:
        got = f"{type(problem).__name__}: {problem}"
        raise _folder_error(folder, f"{LABELS_FILE} cannot be used", got=got, expected="id2label, numbered from 0") from None


def load_adapter(folder: Path) -> AdapterState:
    """Read an adapter folder that Atoll or PEFT wrote.

    Raises: AdapterFolderError for anything that cannot be read exactly, rather than a module left out in silence.
    """
    config = _read_config(folder)
    kind = _kind_of(config, folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    head: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _read_tensors(folder).items():
        match = _TENSOR.fullmatch(key)
        saved = _SAVED.fullmatch(key) if config.get("modules_to_save") else None
        if match is None and saved is not None:
            head.setdefault(saved["module"], {})[saved["side"]] = tensor.float()
            continue
        if match is None:
            expected = f"{_PREFIX}MODULE.lora_A.weight (or lora_B)"
            raise _folder_error(folder, "a tensor that is not part of a LoRA pair", got=key, expected=expected)
        pairs.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not pairs and not head:
        raise _folder_error(folder, "the adapter holds no tensors", got="0 tensors", expected="lora_A and lora_B for every module")
    modules = {name: _module_of(folder, name, pair, config) for name, pair in pairs.items()}
    found = {name: _full_weights_of(adapter) for name, adapter in modules.items() if kind == "lora"}
    full_weights = {name: change for name, change in found.items() if change is not None}
    full_weights |= {name: _head_of(folder, name, sides) for name, sides in head.items()}
    return AdapterState(kind, {name: adapter for name, adapter in modules.items() if name not in full_weights}, full_weights)


def _head_of(folder: Path, name: str, sides: Mapping[str, torch.Tensor]) -> FullWeightDelta:
    weight = sides.get("weight")
    if weight is None or weight.ndim != 2:
        raise _folder_error(folder, f"{name} is no linear module", got=", ".join(sides), expected="a weight, and a bias or none")
    return FullWeightDelta(weight, sides.get("bias"))


def _pair_of(change: FullWeightDelta) -> ModuleAdapter:
    num_inputs, num_outputs = change.size
    if num_inputs <= num_outputs:
        return ModuleAdapter(torch.eye(num_inputs), change.change_OI, 1.0)
    return ModuleAdapter(change.change_OI, torch.eye(num_outputs), 1.0)


def _full_weights_of(adapter: ModuleAdapter) -> FullWeightDelta | None:
    """What `_pair_of` made a pair of; None: a pair that was trained as one."""
    num_inputs, num_outputs = adapter.size
    if adapter.scaling != 1.0 or adapter.rank != min(adapter.size):
        return None
    one, other = (adapter.down_RI, adapter.up_OR) if num_inputs <= num_outputs else (adapter.up_OR, adapter.down_RI)
    return FullWeightDelta(other) if torch.equal(one, torch.eye(adapter.rank)) else None


def _config_of(state: AdapterState, base_name: str, transposed: bool) -> dict[str, Any]:
    ranks = state.ranks
    alphas = {name: adapter.scaling * adapter.rank for name, adapter in state.modules.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": _PEFT_TYPE[state.kind],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(state.modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        siblings = [p.parent.name for p in sorted(folder.parent.glob(f"*/{CONFIG_FILE}"))] if folder.parent.is_dir() else []
        found = f"folders with an adapter beside it: {', '.join(siblings[:5])}" if siblings else "no such file"
        raise _folder_error(folder, f"there is no {CONFIG_FILE}", got=found, expected="a PEFT adapter folder")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise _folder_error(folder, f"{CONFIG_FILE} is not JSON", got=str(problem), expected="the file as PEFT wrote it") from None
    if not isinstance(config, dict):
        raise _folder_error(folder, f"{CONFIG_FILE} is not an object", got=type(config).__name__, expected="the file as PEFT wrote it")
    return config


def _kind_of(config: Mapping[str, Any], folder: Path) -> Kind:
    kinds = {peft_type: kind for kind, peft_type in _PEFT_TYPE.items()}
    if config.get("peft_type") not in kinds:
        got = f"peft_type = {config.get('peft_type')!r}"
        raise _folder_error(folder, "an adapter of a kind Atoll does not train", got=got, expected="LORA")
    # Of another task they stand for what the base has as well, and replace it.
    changed = [key for key in _MEANING if config.get(key) and not (key == "modules_to_save" and config.get("task_type") == "SEQ_CLS")]
    if changed or config.get("bias", "none") != "none":
        got = ", ".join(f"{key} = {config[key]!r}" for key in changed) or f"bias = {config['bias']!r}"
        raise _folder_error(folder, "a variant of LoRA that Atoll does not train", got=got, expected="plain LoRA pairs, bias = 'none'")
    return kinds[config["peft_type"]]


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise _folder_error(folder, f"there is no {WEIGHTS_FILE}", got=_names(folder), expected="weights in the safetensors format")
    try:
        return load_file(path)
    except SafetensorError as problem:
        raise _folder_error(folder, f"{WEIGHTS_FILE} cannot be read", got=str(problem), expected="a whole safetensors file") from None


def _module_of(folder: Path, name: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> ModuleAdapter:
    if set(pair) != {"A", "B"}:
        raise _folder_error(folder, f"half a LoRA pair for {name}", got=f"lora_{next(iter(pair))} only", expected="lora_A and lora_B")
    down, up = pair["A"], pair["B"]
    rank, expected = down.shape[0], _pattern(config.get("rank_pattern"), name, config.get("r"))
    if down.ndim != 2 or up.ndim != 2 or rank != up.shape[1] or rank != expected:
        got = f"lora_A {tuple(down.shape)}, lora_B {tuple(up.shape)}"
        raise _folder_error(folder, f"the shapes of {name} do not match the configuration", got=got, expected=f"rank {expected}")
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise _folder_error(folder, "lora_alpha is not a number", got=repr(alpha), expected="a number")
    return ModuleAdapter(down, up, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the module's name, or its end after a dot."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matches, default)


def _names(folder: Path) -> str:
    names: Sequence[str] = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) or "an empty folder"


def _folder_error(folder: Path, what: str, *, got: str, expected: str) -> AdapterFolderError:
    do = "give a folder saved by Atoll or by PeftModel.save_pretrained"
    return AdapterFolderError(what, where=str(folder), got=got, expected=expected, do=do)
