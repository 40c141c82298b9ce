"""A checkpoint's headers tell the same modules as the loaded model, for every family; broken folders are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from atoll.base.families import FAMILIES
from atoll.base.read_shapes import read_shapes
from atoll.errors import ArchitectureError, BaseFolderError, InputError, WeightsError

LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
    "gemma": LLAMA | {"head_dim": 16},
    "gemma2": LLAMA | {"head_dim": 16},
    "gemma3_text": LLAMA | {"head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
                 "max_position_embeddings": 64},
    "phi": LLAMA,
    "phi3": LLAMA | {"pad_token_id": 0},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64},
    "stablelm": LLAMA,
}  # fmt: skip


def build(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type]))


def walk(model: PreTrainedModel) -> set[tuple[str, int, int]]:
    """The oracle: linear layers in the module tree, without the head."""
    found = set()
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        if isinstance(module, nn.Linear):
            found.add((name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            found.add((name, module.nx, module.nf))
    return found


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    model, folder = build(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(folder: Path, rename: Any) -> None:
    """Write the header again with other tensor names; the data stays."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = {rename(name): value for name, value in json.loads(raw[8 : 8 + size]).items()}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def test_every_known_family_is_tested() -> None:
    generating = {name for name, family in FAMILIES.items() if family.causal}
    assert generating <= set(CONFIGS), "the others are tested as classifiers"


def test_headers_tell_the_modules_of_the_loaded_model(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    shapes = read_shapes(str(folder))
    assert {(m.name, m.d_in, m.d_out) for m in shapes.modules} == walk(model)
    assert [m.block for m in shapes.modules] == sorted(m.block for m in shapes.modules)
    assert shapes.num_parameters == sum(p.numel() for p in model.parameters())
    assert (shapes.num_blocks, shapes.d_model, shapes.vocab_size, shapes.num_heads) == (2, 32, 64, 4)
    assert shapes.tied_head == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert shapes.stored_bytes_per_weight == 4.0
    assert {m.kind for m in shapes.modules} == {"attention", "mlp"}


def test_known_families_list_modules_in_the_order_of_the_model(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    shapes = read_shapes(str(folder))
    if shapes.model_type in FAMILIES:
        ours = [m.name for m in shapes.modules]
        assert ours == [name for name, _ in model.named_modules() if name in set(ours)]


BARE = [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model."), ("llama", "model.")]


@pytest.mark.parametrize(("model_type", "prefix"), BARE)
def test_checkpoints_of_the_bare_decoder_give_the_names_of_the_whole_model(tmp_path: Path, model_type: str, prefix: str) -> None:
    build(model_type).save_pretrained(tmp_path)
    whole = read_shapes(str(tmp_path))
    rewrite(tmp_path, lambda name: name.removeprefix(prefix))
    assert read_shapes(str(tmp_path)) == whole


def test_sharded_weights_are_read_through_their_index(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert read_shapes(str(tmp_path / "parts")) == read_shapes(str(tmp_path / "whole"))


def test_bf16_is_two_bytes_a_weight(tmp_path: Path) -> None:
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert read_shapes(str(tmp_path)).stored_bytes_per_weight == 2.0


def test_tiny_is_built_in() -> None:
    shapes = read_shapes("tiny")
    assert shapes.model_type == "llama"
    assert 10**6 <= shapes.num_parameters <= 2 * 10**6


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


def make_bin_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def make_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_part(folder: Path) -> None:
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    min(folder.glob("model-*.safetensors")).unlink()


def lose_the_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), BaseFolderError, "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), BaseFolderError, "cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), BaseFolderError, "no JSON object"),
    "no model_type": (lambda f: edit_config(f, model_type=None), BaseFolderError, "what kind"),
    "no hidden_size": (lambda f: edit_config(f, hidden_size=None), BaseFolderError, "hidden_size"),
    "encoder": (lambda f: edit_config(f, model_type="bert", architectures=["BertForMaskedLM"]), ArchitectureError, "causal"),
    "encoder-decoder": (lambda f: edit_config(f, is_encoder_decoder=True), ArchitectureError, "causal"),
    "classifier": (lambda f: edit_config(f, architectures=["LlamaForSequenceClassification"]), ArchitectureError, "causal"),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), WeightsError, "quantized"),
    "other depth": (lambda f: edit_config(f, num_hidden_layers=3), WeightsError, "do not fit"),
    "adapter folder": (make_adapter, BaseFolderError, "adapter"),
    "only .bin": (make_bin_only, BaseFolderError, "no safetensors"),
    "cut short": (cut_weights, WeightsError, "whole"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), WeightsError, "whole"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"x" * 16), WeightsError, "whole"),
    "part missing": (lose_a_part, WeightsError, "part"),
    "index missing": (lose_the_index, BaseFolderError, "put together"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_broken_folder_is_one_readable_error(llama_folder: Path, case: str) -> None:
    damage, error, words = BROKEN[case]
    damage(llama_folder)
    with pytest.raises(InputError, match=words) as caught:
        read_shapes(str(llama_folder))
    assert type(caught.value) is error
    assert all((caught.value.where, caught.value.got, caught.value.expected, caught.value.do))


def test_a_misspelt_folder_names_its_neighbour(llama_folder: Path) -> None:
    with pytest.raises(BaseFolderError) as caught:
        read_shapes(str(llama_folder.parent / "lama"))
    assert str(llama_folder) in caught.value.do


def test_a_hub_id_in_the_local_cache_needs_no_network(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name: str(llama_folder / name))
    assert read_shapes("org/name") == read_shapes(str(llama_folder))


def test_an_unreachable_hub_id_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(BaseFolderError, match="neither a folder") as caught:
        read_shapes("org/does-not-exist")
    assert "no route" in caught.value.got
