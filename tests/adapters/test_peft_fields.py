"""Every field of PEFT's LoraConfig: an adapter folder means what PEFT makes of it when it loads it again, or is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.peft_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Form,
    check_adapter,
    check_peft_loads,
    check_peft_means,
    load_adapter,
    save_adapter,
)
from atoll.adapters.peft_rules.fields import FIELDS, table
from atoll.errors import AdapterFitError, AdapterFolderError, AtollError

from tests.conftest import random_model

IDS = torch.arange(24).view(2, 12) * 3 % 96
SMALL = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}

EXACT: dict[str, list[dict[str, Any]]] = {
    "task_type": [{"task_type": None}],
    "peft_type": [{}],
    "auto_mapping": [{"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}],
    "peft_version": [{}],
    "base_model_name_or_path": [{"base_model_name_or_path": "somewhere/else"}],
    "revision": [{"revision": "main"}],
    "inference_mode": [{"inference_mode": True}],
    "r": [{"r": 1}, {"r": 40}],
    "target_modules": [
        {"target_modules": "all-linear"}, {"target_modules": r".*layers\.1\..*_proj"}, {"target_modules": ["self_attn.v_proj"]},
        {"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["model.layers.0.mlp.up_proj"]},
    ],
    "exclude_modules": [{"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"exclude_modules": r".*\.0\..*"}],
    "lora_alpha": [{"lora_alpha": 16}, {"lora_alpha": 0.5}, {"lora_alpha": -4}],
    "lora_dropout": [{"lora_dropout": 0.5}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}, {"fan_in_fan_out": True, "target_modules": ["embed_tokens"]}],
    "use_rslora": [{"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "target_modules": ["q_proj", "lm_head"]}],
    "init_lora_weights": [
        {"init_lora_weights": False}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "eva"}, {"init_lora_weights": "orthogonal"},
    ],
    "layers_to_transform": [{"layers_to_transform": 1}, {"layers_to_transform": [0]}],
    "layers_pattern": [{"layers_to_transform": [1], "layers_pattern": one} for one in ("layers", ["layers"])],
    "rank_pattern": [
        {"rank_pattern": {r"layers\.1.*": 3, "q_proj": 1}}, {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 4}},
        {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 5}},
    ],
    "alpha_pattern": [{"alpha_pattern": {"q_proj": 7, r".*": 1}}],
    "runtime_config": [{}],
    "megatron_core": [{"megatron_core": "megatron.core"}],
    "qalora_group_size": [{"qalora_group_size": 4}],
    "loftq_config": [{"loftq_config": {"loftq_bits": 4}}],
    "eva_config": [{"init_lora_weights": "eva"}],
    "corda_config": [{}],
    "lora_ga_config": [{}],
}  # fmt: skip
"""By field, settings over SMALL that PEFT saves itself and Atoll applies."""
REFUSED: dict[str, list[Any]] = {
    "task_type": ["SEQ_2_SEQ_LM", "TOKEN_CLS", "no such task", 3],
    "r": [0, -1, True, "4", 2.5, None],
    "lora_alpha": [0, "4", None, float("nan"), float("inf"), 10**400, True],
    "use_rslora": ["false", 1.5],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": "3"}, ["q_proj"], {"(": 2}, {r"(\w+\.?)+!": 2}, {"(?i)q_proj": 2}],
    "alpha_pattern": [{"q_proj": None}, {"q_proj": float("nan")}, {r"((a|[a-z_.0-9])+)+!": 2}],
    "target_modules": [3, [3], {"q_proj": 1}, "(", r"(.*)*(.*)*(.*)*!", ["q_proj"], ["q_proj", "down_proj", "up_proj"], None, []],
    "exclude_modules": [3, ["q_proj"], "("],
    "layers_to_transform": [[0], "0", [None], 1.0],
    "layers_pattern": [3, [3]],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "something new", 3, ["gaussian"]],
    "bias": ["all", "lora_only", True, 3],
    "modules_to_save": [["lm_head"], ["embed_tokens", "lm_head"], "lm_head"],
    "megatron_config": [{"a": 1}],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "use_dora": [True, "yes", 1],
    "velora_config": [{"num_groups": 4}],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True],
    "monteclora_config": [{"num_samples": 2}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "lora_bias": [True],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "use_bdlora": [{"nblocks": 2}, True],
    "arrow_config": [{"top_k": 1}],
    "kasa_config": [{"beta": 1.0}],
    "ensure_weight_tying": [True],
    "a_field_of_a_later_peft": [True, 1, "on", {"a": 1}],
}  # fmt: skip
"""By field, what a file may say that is not applied."""
OTHER_KINDS = (
    "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "VBLORA", "FOURIERFT", "XLORA",
    "HRA", "BONE", "RANDLORA", "TRAINABLE_TOKENS", "SHIRA", "C3A", "MISS", "ROAD", "WAVEFT", "lora", "", None, 3, ["LORA"],
)  # fmt: skip


def saved(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """An adapter of random numbers, as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(random_model(family), LoraConfig(**{**SMALL, **settings}))
        g = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
        model.save_pretrained(folder)
    return folder


def by_peft(folder: Path, family: str) -> torch.Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(random_model(family), folder).eval()(IDS).logits


def by_us(folder: Path, model: PreTrainedModel) -> torch.Tensor:
    state = load_adapter(folder)
    check_adapter(folder, model)
    with torch.device("meta"):
        check_peft_means(folder, type(model)(model.config))
    with torch.no_grad(), attached(model, state):
        return model(IDS).logits


def edited(folder: Path, **values: Any) -> Path:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def test_every_field_of_this_peft_is_in_the_tables() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == set(FIELDS), "say in peft_rules/fields.py what becomes of it, and show it below"
    assert fields == (EXACT.keys() | REFUSED.keys()) & fields
    page = Path(__file__).parents[2] / "docs" / "compatibility.md"
    assert table() in page.read_text(encoding="utf-8"), "write table() of peft_rules/fields.py there"


@pytest.mark.parametrize(
    ("field", "settings"), [pytest.param(field, one, id=f"{field}-{n}") for field, many in EXACT.items() for n, one in enumerate(many)]
)
def test_what_is_applied_is_what_peft_loads(field: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, **settings)
    assert field in json.loads((folder / CONFIG_FILE).read_text()) or field == "runtime_config"
    model = random_model("llama")
    ours, theirs = by_us(folder, model), by_peft(folder, "llama")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - random_model("llama")(IDS).logits).abs().max() > 1e-3, "the adapter does something"


@pytest.mark.parametrize(
    ("field", "value"), [pytest.param(field, one, id=f"{field}-{n}") for field, many in REFUSED.items() for n, one in enumerate(many)]
)
def test_what_is_not_applied_is_refused(field: str, value: object, tmp_path: Path) -> None:
    folder = edited(saved(tmp_path), **{field: value})
    with pytest.raises(AdapterFolderError) as caught:
        by_us(folder, random_model("llama"))
    page = caught.value.page()
    assert field in page, page


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapters_are_refused_by_name(kind: object, tmp_path: Path) -> None:
    with pytest.raises(AdapterFolderError) as caught:
        load_adapter(edited(saved(tmp_path), peft_type=kind))
    assert json.dumps(kind)[:20] in caught.value.got


@pytest.mark.parametrize("family", ["gpt2", "gemma", "opt", "gpt_neox"])
def test_embedding_and_head_are_applied_in_other_families_and_where_they_are_one(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    names = {id(m): name.rpartition(".")[2] for name, m in model.named_modules()}
    targets = [names[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    for number, some in enumerate((targets[:1], targets[1:], targets)):
        folder = saved(tmp_path / str(number), family, target_modules=some)
        torch.testing.assert_close(by_us(folder, model), by_peft(folder, family), rtol=1e-5, atol=1e-5)


def change(folder: Path, **values: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS_FILE), **values}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS_FILE)


def test_a_weight_of_the_base_that_comes_with_it_must_be_the_bases_own(tmp_path: Path) -> None:
    folder = saved(tmp_path, target_modules=["lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    own = load_file(folder / WEIGHTS_FILE)[key]
    by_us(folder, random_model("llama"))
    for other in (own + 1, torch.cat([own, own])):
        change(folder, **{key: other})
        with pytest.raises(AdapterFolderError, match="brings a weight of the base along"):
            by_us(folder, random_model("llama"))


@pytest.mark.parametrize(("family", "name"), [("opt", "embed_positions"), ("gpt2", "wpe"), ("gpt2", "wte"), ("opt", "embed_tokens")])
def test_an_embedding_of_any_name_is_as_in_peft(family: str, name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, family, target_modules=[name])
    try:
        theirs = by_peft(folder, family)
    except RuntimeError:  # It is given more than ids.
        with pytest.raises(AdapterFitError, match=name):
            check_adapter(folder, random_model(family))
    else:
        torch.testing.assert_close(by_us(folder, random_model(family)), theirs, rtol=1e-5, atol=1e-5)


def test_a_resized_embedding_and_weights_of_another_format_say_what_to_do(tmp_path: Path) -> None:
    folder = saved(tmp_path / "resized", target_modules=["lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    own = load_file(folder / WEIGHTS_FILE)[key]
    change(folder, **{key: torch.cat([own, own[:4]])})
    with pytest.raises(AdapterFolderError) as caught:
        check_adapter(folder, random_model("llama"))
    assert "100 rows" in caught.value.got
    assert "resize_token_embeddings" in caught.value.do
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFolderError, match="there is no") as caught:
        load_adapter(folder)
    assert "PeftModel.from_pretrained" in caught.value.do
    for place, got in ((tmp_path, "in it: resized"), (tmp_path / "other", "beside it: resized"), (tmp_path / "no" / "x", "no such file")):
        with pytest.raises(AdapterFolderError) as caught:
            load_adapter(place)
        assert got in caught.value.got


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value: float, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    key = next(iter(load_file(folder / WEIGHTS_FILE)))
    tensor = load_file(folder / WEIGHTS_FILE)[key]
    tensor[0, 0] = value
    change(folder, **{key: tensor})
    with pytest.raises(AdapterFolderError, match="numbers that are none"):
        load_adapter(folder)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"r": ' + "1" * 5000 + "}", "{" + '"a":{' * 100_000, '{"r": 1e999}', "null", "\x00"])
def test_a_hostile_config_is_a_page(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(AtollError):
        load_adapter(folder)


def test_a_folder_of_adapters_says_which_to_give(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(AdapterFolderError, match="there is no") as caught:
        load_adapter(folder.parent)
    assert caught.value.do == f"give {folder}"


def deepseek() -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("ending", "goes"), [("self_attn.o_proj", True), ("layers.0.mlp.down_proj", False)])
def test_what_peft_turns_into_experts_is_refused_in_both_directions(ending: str, goes: bool, tmp_path: Path) -> None:
    names = {name: module for name, module in deepseek().named_modules() if name.endswith(ending)}
    sizes = {name: (module.in_features, module.out_features) for name, module in names.items()}
    state = fresh_adapters("lora", sizes, dict.fromkeys(sizes, 2), 4, 0)  # type: ignore[arg-type]
    save_adapter(state, tmp_path, base_name="x")
    with contextlib.nullcontext() if goes else pytest.raises(AdapterFitError, match="PEFT would not load"):
        check_peft_loads(state, Form("x"), deepseek())
    with contextlib.nullcontext() if goes else pytest.raises(AdapterFolderError, match="something else"):
        check_peft_means(tmp_path, deepseek())
