"""Adapter folders as Hugging Face PEFT reads and writes them: adapter_config.json and adapter_model.safetensors.

Written here because an AdapterState has no model to ask PEFT with; the tests hold both directions against PEFT itself, and a run asks PEFT
(peft_rules/loads.py) before it writes. PEFT has no bottleneck adapter: those folders carry peft_type ATOLL_BOTTLENECK and load in Atoll
only.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.peft_rules.fields import refused_fields
from atoll.adapters.peft_rules.loads import Pair, unlike
from atoll.adapters.peft_rules.patterns import wrong_pattern
from atoll.adapters.peft_rules.targets import targeted
from atoll.adapters.state import AdapterState, Kind, ModuleAdapter
from atoll.errors import AdapterFitError, AdapterFolderError
from atoll.parsed import parse_json
from atoll.units import counted

CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE = "adapter_config.json", "adapter_model.safetensors", "labels.json"
_PEFT_TYPE: dict[Kind, str] = {"lora": "LORA", "bottleneck": "ATOLL_BOTTLENECK"}
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?(embedding)|\.weight)")
_SAVED = re.compile(r"base_model\.model\.(?P<module>.+?)(?P<base>\.base_layer)?\.(?P<side>weight|bias)")
_SIDES = ("weight", "bias")
_LARGEST_CONFIG_BYTES = 2**25
_SELF_AND_IDS = 2
_RANK, _ALPHA = 8, 8
"""PEFT's, where the file does not say."""
_SAVED_BY = "give a folder saved by Atoll or by PeftModel.save_pretrained"
_OLD_WEIGHTS_FILE = "adapter_model.bin"
_SAVED_ANEW = "write it anew: PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW_FOLDER)"
_RESIZED = (
    "give the base with as many tokens as the adapter was made with: BASE.resize_token_embeddings(ROWS), save_pretrained, and beside it "
    "the tokenizer of the adapter's folder"
)
_MERGE = "merge it with PEFT (merge_and_unload, save_pretrained), and give the merged folder as the base"


@dataclass(frozen=True, slots=True)
class Form:
    """How a state is written for PEFT beside its numbers."""

    base_name: str
    transposed: bool = False
    """Whether the base keeps weights as (inputs, outputs), as GPT-2 does."""
    head: tuple[str, ...] = ()
    """A classifier's modules that are saved as they are (modules_to_save)."""
    labels: tuple[str, ...] = ()
    embeddings: frozenset[str] = frozenset()
    """Modules that are embeddings, whose pairs have other names in PEFT."""
    revision: str | None = None
    """Of a base from a hub."""


def save_adapter(
    state: AdapterState, folder: Path, *, base_name: str, transposed: bool = False, head: Collection[str] = (), labels: Sequence[str] = (),
    embeddings: Collection[str] = (), revision: str | None = None,
) -> None:  # fmt: skip
    """Write the state as a PEFT adapter folder; what is given beside it is described at `Form`.

    A full weight becomes a LoRA pair of the full rank, of which one side is the identity: no bit is lost. But the modules of a
    classifier's head are saved as they are, and its labels in a file beside.
    """
    form = Form(base_name, transposed, tuple(head), tuple(labels), frozenset(embeddings), revision)
    folder.mkdir(parents=True, exist_ok=True)
    heads = {name: zip(_SIDES, state.full_weights[name].tensors, strict=False) for name in form.head}
    tensors = {f"{_PREFIX}{name}.{side}": tensor for name, sides in heads.items() for side, tensor in sides}
    pairs = {name: pair_of(change) for name, change in state.full_weights.items() if name not in form.head}
    for name, adapter in {**state.modules, **pairs}.items():
        down, up = _keys(name, form)
        tensors |= {down: adapter.down_RI.contiguous(), up: adapter.up_OR.contiguous()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if form.head:
        named = {"id2label": dict(enumerate(form.labels))}
        (folder / LABELS_FILE).write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CONFIG_FILE).write_text(json.dumps(peft_config(state, form), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_peft_loads(state: AdapterState, form: Form, skeleton: nn.Module) -> None:
    """Whether PEFT itself would load what `save_adapter` writes of this state onto a model of this make, whose weights are not looked at.

    Raises: AdapterFitError.
    """
    wrong = None if state.kind != "lora" else unlike(peft_config(state, form), _pairs(state, form.head), skeleton)
    if wrong is not None:
        got, others = wrong
        some = 0 < len(others) < len({name.rpartition(".")[2] for name in state.parts})
        raise AdapterFitError(
            "PEFT would not load what this run trains", where="[adapter] targets", got=got,
            expected="modules that PEFT puts a LoRA pair on",
            do=f"write targets = {json.dumps(others)} in [adapter]" if some else "name other modules in targets",
        )  # fmt: skip


def check_peft_means(folder: Path, skeleton: nn.Module) -> None:
    """Whether PEFT itself makes of an adapter folder what `load_adapter` does, on a model of this make.

    Raises: AdapterFolderError.
    """
    state, config = load_adapter(folder), _read_config(folder)
    wrong = None if state.kind != "lora" else unlike(config, _pairs(state, config.get("modules_to_save") or ()), skeleton)
    if wrong is not None:
        what = "PEFT makes something else of the adapter on this base"
        raise _folder_error(folder, what, got=wrong[0], expected="the pairs in its files")


def _pairs(state: AdapterState, head: Collection[str]) -> dict[str, Pair]:
    ranks = state.ranks
    parts = {name: part for name, part in state.parts.items() if not any(f".{name}".endswith(f".{one}") for one in head)}
    return {name: (ranks[name], *part.size, part.scaling if isinstance(part, ModuleAdapter) else 1.0) for name, part in parts.items()}


def _keys(name: str, form: Form) -> tuple[str, str]:
    kind, end = ("lora_embedding", "") if name in form.embeddings else ("lora", ".weight")
    return f"{_PREFIX}{name}.{kind}_A{end}", f"{_PREFIX}{name}.{kind}_B{end}"


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
    """Read an adapter folder that Atoll or PEFT wrote; whether it means the same on a model is what `check_adapter` looks at.

    Raises: AdapterFolderError for anything that cannot be applied exactly as PEFT does, rather than a module left out in silence.
    """
    config = _read_config(folder)
    kind = _kind_of(config, folder)
    stored = _stored(folder, config)
    if not stored.pairs and not stored.head:
        raise _folder_error(folder, "the adapter holds no tensors", got="0 tensors", expected="lora_A and lora_B for every module")
    _check_targets(folder, config, set(stored.pairs), None)
    modules = {name: _module_of(folder, name, pair, config) for name, pair in stored.pairs.items()}
    found = {
        name: _full_weights_of(adapter) for name, adapter in modules.items() if kind == "lora" and name not in stored.embeddings
    }  # fmt: skip
    full_weights = {name: change for name, change in found.items() if change is not None}
    full_weights |= {name: _head_of(folder, name, sides) for name, sides in stored.head.items()}
    state = AdapterState(kind, {name: adapter for name, adapter in modules.items() if name not in full_weights}, full_weights)
    if not state.is_finite():
        broken = next(name for name, part in state.parts.items() if not all(bool(torch.isfinite(one).all()) for one in part.tensors))
        got = f"NaN or infinity in {broken}"
        raise _folder_error(folder, "the adapter holds numbers that are none", got=got, expected="finite numbers")
    return state


def check_adapter(folder: Path, model: nn.Module) -> None:
    """Whether an adapter folder means on this model what PEFT makes of it there.

    Raises: AdapterFolderError where PEFT would adapt other modules, or replace a weight of the base by another one; AdapterFitError where a
    module is not of the class that the adapter is for.
    """
    config = _read_config(folder)
    stored = _stored(folder, config)
    modules = dict(model.named_modules())
    for name in stored.pairs.keys() & modules.keys():
        # Some position embeddings (OPT's) are given more than ids, and fail with a pair in PEFT, too.
        is_of_ids = isinstance(modules[name], nn.Embedding) and len(signature(type(modules[name]).forward).parameters) == _SELF_AND_IDS
        if (name in stored.embeddings) != is_of_ids:
            raise AdapterFitError(
                f"the adapter is not for {name} as this model has it", where=str(folder), got=type(modules[name]).__name__,
                expected="an embedding of ids alone" if name in stored.embeddings else "a projection",
                do="use the adapter with the base model it was trained on",
            )  # fmt: skip
    # Of blocks that run in a host nothing is here.
    _check_targets(folder, config, set(stored.pairs), model)
    for name, sides in stored.kept.items():
        module = modules.get(name)
        for side, tensor in sides.items():
            own: Any = getattr(module, side, None)
            if own is None or own.shape != tensor.shape or not (own.is_meta or torch.equal(tensor.to(own), own)):
                resized = own is not None and own.shape != tensor.shape
                raise _folder_error(
                    folder, "the adapter brings a weight of the base along, and it is another than this base's",
                    got=f"{name}.{side} of {counted(len(tensor), 'row')}" if resized else f"{name}.{side}",
                    expected=counted(len(own), "row") if resized else "the weight that the base has", do=_RESIZED if resized else _MERGE,
                )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Stored:
    """The tensors of an adapter folder, by module."""

    pairs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    """Those of `pairs` that are for an embedding."""
    head: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Of a classifier."""
    kept: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """What PEFT saves of embedding and head where one of them is adapted: the base's own weights."""


def _stored(folder: Path, config: Mapping[str, Any]) -> _Stored:
    stored, heads = _Stored(), config.get("modules_to_save") or ()
    for key, tensor in _read_tensors(folder).items():
        match, saved = _TENSOR.fullmatch(key), _SAVED.fullmatch(key)
        if match is not None:
            stored.pairs.setdefault(match["module"], {})[match["side"]] = tensor.float()
            if match["embedding"]:
                stored.embeddings.add(match["module"])
        elif saved is not None and "lora_" not in saved["module"]:
            is_head = any(f".{saved['module']}".endswith(f".{name}") for name in heads)
            (stored.head if is_head else stored.kept).setdefault(saved["module"], {})[saved["side"]] = tensor.float()
        else:
            expected = f"{_PREFIX}MODULE.lora_A.weight (or lora_B)"
            raise _folder_error(folder, "a tensor that is not part of a LoRA pair", got=key, expected=expected)
    return stored


def _check_targets(folder: Path, config: Mapping[str, Any], names: set[str], model: nn.Module | None) -> None:
    """Whether PEFT adapts these modules, and of a model no others."""
    all_names = names if model is None else {name for name, _ in model.named_modules() if name} | names
    wrong = wrong_pattern(config, all_names)
    try:
        found = targeted(config, all_names, model) if wrong is None else set()
    except ValueError as problem:
        wrong = str(problem)
    if wrong is not None:
        raise _folder_error(folder, f"{CONFIG_FILE} cannot be used", got=wrong, expected="names or patterns as PEFT reads them")
    if found != names:
        others = sorted(found ^ names)
        raise _folder_error(
            folder, "the tensors are not those of the modules that adapter_config.json targets",
            got=f"{others[0]}, which is targeted and has none" if others[0] in found else f"{others[0]}, which is not targeted",
            expected="a pair of matrices for each module that target_modules means, without exclude_modules and modules_to_save, "
            "in the blocks of layers_to_transform and layers_pattern; and no others",
        )  # fmt: skip


def _head_of(folder: Path, name: str, sides: Mapping[str, torch.Tensor]) -> FullWeightDelta:
    weight = sides.get("weight")
    if weight is None or weight.ndim != 2:
        raise _folder_error(folder, f"{name} is no linear module", got=", ".join(sides), expected="a weight, and a bias or none")
    return FullWeightDelta(weight, sides.get("bias"))


def pair_of(change: FullWeightDelta) -> ModuleAdapter:
    """A full weight as a LoRA pair of the full rank, of which one side is the identity."""
    num_inputs, num_outputs = change.size
    if num_inputs <= num_outputs:
        return ModuleAdapter(torch.eye(num_inputs), change.change_OI, 1.0)
    return ModuleAdapter(change.change_OI, torch.eye(num_outputs), 1.0)


def _full_weights_of(adapter: ModuleAdapter) -> FullWeightDelta | None:
    """What `pair_of` made a pair of; None: a pair that was trained as one."""
    num_inputs, num_outputs = adapter.size
    if adapter.scaling != 1.0 or adapter.rank != min(adapter.size):
        return None
    one, other = (adapter.down_RI, adapter.up_OR) if num_inputs <= num_outputs else (adapter.up_OR, adapter.down_RI)
    return FullWeightDelta(other) if torch.equal(one, torch.eye(adapter.rank)) else None


def peft_config(state: AdapterState, form: Form) -> dict[str, Any]:
    """The adapter_config.json of a state."""
    ranks = {name: rank for name, rank in state.ranks.items() if name not in form.head}
    alphas = {name: rank * (state.modules[name].scaling if name in state.modules else 1.0) for name, rank in ranks.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": _PEFT_TYPE[state.kind],
        "task_type": "SEQ_CLS" if form.head else "CAUSAL_LM",
        "base_model_name_or_path": form.base_name,
        "revision": form.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": form.transposed,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": list(form.head) or None,
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        # PEFT saves adapters of other names than "default" in folders of their names.
        near = {"in": folder.glob(f"*/{CONFIG_FILE}"), "beside": folder.parent.glob(f"*/{CONFIG_FILE}")}
        names = {place: ", ".join(sorted(path.parent.name for path in paths)[:5]) for place, paths in near.items()}
        found = next((f"folders with an adapter {place} it: {some}" for place, some in names.items() if some), "no such file")
        do = f"give {folder / names['in'].partition(', ')[0]}" if names["in"] else _SAVED_BY
        raise _folder_error(folder, f"there is no {CONFIG_FILE}", got=found, expected="a PEFT adapter folder", do=do)
    try:
        if path.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise ValueError(counted(path.stat().st_size, "byte"))
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise _folder_error(folder, f"{CONFIG_FILE} is not JSON", got=str(problem)[:200], expected="the file as PEFT wrote it") from None
    if not isinstance(config, dict):
        raise _folder_error(folder, f"{CONFIG_FILE} is not an object", got=type(config).__name__, expected="the file as PEFT wrote it")
    return config


def _kind_of(config: Mapping[str, Any], folder: Path) -> Kind:
    kinds = {peft_type: kind for kind, peft_type in _PEFT_TYPE.items()}
    if not isinstance(config.get("peft_type"), str) or config["peft_type"] not in kinds:
        got = f"peft_type = {_short(config.get('peft_type'))}"
        raise _folder_error(folder, "an adapter of a kind Atoll does not train", got=got, expected="LORA", do=_MERGE)
    refused = refused_fields({**config, "peft_type": "LORA"})
    if refused:
        raise _folder_error(
            folder, "a variant of LoRA that Atoll does not apply as PEFT does",
            got=", ".join(f"{key} = {_short(config[key])}" for key in list(refused)[:3]),
            expected="; ".join(f"{key}: {accepted}" for key, accepted in list(refused.items())[:3]), do=_MERGE,
        )  # fmt: skip
    return kinds[config["peft_type"]]


def _short(value: object) -> str:
    try:
        text = json.dumps(value)
    except ValueError:  # Integers of thousands of digits have no text.
        text = "a number that is too large"
    return text if len(text) <= 80 else text[:77] + "..."


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        old = (folder / _OLD_WEIGHTS_FILE).is_file()
        raise _folder_error(
            folder, f"there is no {WEIGHTS_FILE}", got=_names(folder), expected="weights in the safetensors format",
            do=_SAVED_ANEW if old else _SAVED_BY,
        )  # fmt: skip
    try:
        return load_file(path)
    except SafetensorError as problem:
        raise _folder_error(folder, f"{WEIGHTS_FILE} cannot be read", got=str(problem), expected="a whole safetensors file") from None


def _module_of(folder: Path, name: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> ModuleAdapter:
    if set(pair) != {"A", "B"}:
        raise _folder_error(folder, f"half a LoRA pair for {name}", got=f"lora_{next(iter(pair))} only", expected="lora_A and lora_B")
    down, up = pair["A"], pair["B"]
    rank, expected = down.shape[0], _pattern(config.get("rank_pattern"), name, config.get("r", _RANK))
    if down.ndim != 2 or up.ndim != 2 or rank != up.shape[1] or rank != expected:
        got = f"lora_A {tuple(down.shape)}, lora_B {tuple(up.shape)}"
        says = f"rank {expected} (r, rank_pattern)"
        raise _folder_error(folder, f"the shapes of {name} do not match the configuration", got=got, expected=says)
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", _ALPHA))
    return ModuleAdapter(down, up, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the module's name, or its end after a dot."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matches, default)


def _names(folder: Path) -> str:
    names: Sequence[str] = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) or "an empty folder"


def _folder_error(folder: Path, what: str, *, got: str, expected: str, do: str = _SAVED_BY) -> AdapterFolderError:
    return AdapterFolderError(what, where=str(folder), got=got, expected=expected, do=do)
