"""The weights in the files are the weights in memory, or the folder is refused; and no file costs more time or memory than a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.base.classifier import load_classifier
from atoll.base.headers import read_headers, read_index
from atoll.base.load import load_base
from atoll.base.part import part_digest
from atoll.base.read_shapes import read_shapes
from atoll.errors import BaseFolderError, InputError, WeightsError

from tests.conftest import FAMILIES, save_model_folder

Tensors = dict[str, torch.Tensor]


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def change(folder: Path, edit: Callable[[Tensors], object]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def edited(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model folder."""
    save_model_folder(tmp_path, "llama")
    return tmp_path


def add(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.ones(2, 2) for name in names})


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias",
             "score.weight", "model.visual.proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.mlp.gate.weight"],
)  # fmt: skip
def test_a_weight_that_the_model_does_not_take_is_named(name: str, llama: Path) -> None:
    with pytest.raises(WeightsError, match="does not take") as caught:
        load_base(str(change(llama, add(name))))
    assert name in caught.value.got
    with pytest.raises(WeightsError, match="does not take"):
        part_digest(str(llama), 0, 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_weights_that_are_whole_numbers_are_refused(dtype: torch.dtype, llama: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(llama, lambda tensors: tensors.update({name: (tensors[name] * 100).to(dtype)}))
    with pytest.raises(WeightsError, match="whole numbers") as caught:
        load_base(str(llama))
    assert name in caught.value.got


@pytest.mark.parametrize("value", [{"vocab_size": 90}, {"intermediate_size": 40}])
def test_a_weight_of_another_shape_is_named_with_both(value: dict[str, int], llama: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_base(str(edited(llama, **value)))
    assert "weight, (" in caught.value.got
    assert f"where the model has ({next(iter(value.values()))}, " in caught.value.got


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_what_old_checkpoints_keep_beside_the_weights_is_known(family: str, tmp_path: Path) -> None:
    save_model_folder(tmp_path, family)
    block = next(name for name in load_file(tmp_path / "model.safetensors") if ".0." in name).split(".0.")[0]
    names = {"llama": ["self_attn.rotary_emb.inv_freq"], "gpt2": ["attn.bias", "attn.masked_bias"],
             "gpt_neox": ["attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"]}  # fmt: skip
    load_base(str(change(tmp_path, add(*(f"{block}.0.{name}" for name in names[family])))))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_that_generates_becomes_a_classifier_and_nothing_else_is_left(family: str, tmp_path: Path) -> None:
    save_model_folder(tmp_path, family)
    load_classifier(str(tmp_path), ("a", "b"))
    with pytest.raises(WeightsError, match="does not take"):
        load_classifier(str(change(tmp_path, add("something.weight"))), ("a", "b"))


@pytest.mark.parametrize("bits", [None, 16, 8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, bits: Any, llama: Path) -> None:
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        change(llama, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))  # noqa: B023
    with pytest.raises(WeightsError, match="no number") as caught:
        load_base(str(llama), bits=bits)
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.got or "model.norm.weight" in caught.value.got


def test_large_weights_are_numbers(llama: Path) -> None:
    change(llama, lambda tensors: tensors["lm_head.weight"].view(-1)[:9].fill_(3e38))
    load_base(str(llama))


@pytest.mark.parametrize("family", ["gemma", "gpt2", "opt", "bloom"])
def test_a_head_that_contradicts_the_config_is_refused_and_a_copy_is_not(family: str, tmp_path: Path) -> None:
    save_model_folder(tmp_path, family)
    known = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
    embedding = next(name for name in load_file(tmp_path / WEIGHTS) if name.endswith(known))
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    model = load_base(str(tmp_path)).model
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)  # type: ignore[union-attr, arg-type]
    change(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1.0))
    with pytest.raises(WeightsError, match="contradicts"):
        load_base(str(tmp_path))
    load_base(str(edited(tmp_path, tie_word_embeddings=False)))


def test_a_head_that_is_said_to_be_there_must_be(tmp_path: Path) -> None:
    save_model_folder(tmp_path, "gemma")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_base(str(edited(tmp_path, tie_word_embeddings=False)))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "/tmp/model.safetensors", "a/../../b.safetensors", "..\\x.safetensors", "",
             "x\0.safetensors", 3, None, ["a.safetensors"], "model.bin"],
)  # fmt: skip
def test_an_index_that_points_outside_is_refused(name: object, llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "a.safetensors")
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": name}}))
    for read in (read_index, lambda folder: read_headers(str(folder)), lambda folder: load_base(str(folder))):
        with pytest.raises(WeightsError, match="no weight file of its folder"):
            read(llama)


HOSTILE = {
    "deep": "[" * 200_000, "deep objects": '{"a":' * 100_000, "digits": '{"model_type": "llama", "vocab_size": ' + "1" * 5000 + "}",
    "not text": "\udcff", "empty": "", "a list": "[]",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("file", ["config.json", INDEX, "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_json_that_no_library_wrote_is_a_page(file: str, text: str, llama: Path) -> None:
    if file.endswith("index.json"):
        (llama / "model.safetensors").rename(llama / "a.safetensors")
    (llama / file).write_text(text, errors="surrogateescape")
    with pytest.raises(InputError):
        load_base(str(llama))
    if file in ("config.json", INDEX):
        with pytest.raises(InputError):
            read_shapes(str(llama))


SIZES = ("num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "head_dim")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [9_000, 20_000, 10**9, 10**18, 10**4000, -1, 0])
def test_sizes_that_no_model_has_are_a_page(key: str, value: int, llama: Path) -> None:
    if value in (9_000, 20_000) and key != "num_hidden_layers":
        return  # A size like others: whether the weights have it is looked at elsewhere.
    if key == "max_position_embeddings" and value < 10**10:
        return  # Llama's positions are relative.
    edited(llama, **{key: value})
    with pytest.raises(InputError):
        load_base(str(llama))


def test_a_config_within_a_config_is_looked_at_too(llama: Path) -> None:
    with pytest.raises(BaseFolderError, match="cannot be"):
        load_base(str(edited(llama, text_config={"num_hidden_layers": 20_000})))


def test_a_deep_header_is_a_page(llama: Path) -> None:
    text = b"[" * 200_000
    (llama / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    for read in (read_shapes, load_base):
        with pytest.raises(WeightsError):
            read(str(llama))
