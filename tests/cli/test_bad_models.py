"""Wrong model folders, adapters and run directories through the real command: exit 2, one readable page, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.peft_files import save_adapter

from tests.conftest import random_model, save_model_folder

SIZES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.self_attn.k_proj": (32, 16)}


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and an adapter that fit, and a run.toml that would train."""
    folder = tmp_path_factory.mktemp("good")
    save_model_folder(folder / "model", "llama")
    save_adapter(fresh_adapters("lora", SIZES, dict.fromkeys(SIZES, 2), 4, 0), folder / "adapter", base_name="model")
    (folder / "train.csv").write_text("a,b\n" + "w1 w2,w3 w4\n" * 6)
    return folder


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes a key out."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path: Path) -> None:
    """Keep the first half of a file, as a broken download does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "folder misspelt": (lambda m: m.rename(m.parent / "modell"), ("B301", "no such model folder", "modell")),
    "a file, not a folder": (lambda m: (shutil.rmtree(m), m.write_text("x")), ("B301",)),
    "empty folder": (lambda m: (shutil.rmtree(m), m.mkdir()), ("B301", "config.json")),
    "no config": (lambda m: (m / "config.json").unlink(), ("B301", "config.json")),
    "config not JSON": (lambda m: (m / "config.json").write_text("{"), ("B301", "config.json")),
    "config a list": (lambda m: (m / "config.json").write_text("[]"), ("B301", "config.json")),
    "no model type": (lambda m: edit(m / "config.json", model_type=None), ("B301", "model_type")),
    "unknown model type": (lambda m: edit(m / "config.json", model_type="lama"), ("B30", "lama")),
    "encoder": (lambda m: edit(m / "config.json", model_type="bert", architectures=["BertModel"]), ("B302", "causal language model")),
    "encoder and decoder": (lambda m: edit(m / "config.json", model_type="t5", is_encoder_decoder=True), ("B302", "causal")),
    "quantized already": (lambda m: edit(m / "config.json", quantization_config={"bits": 4}), ("B304", "quantized")),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ("B301", "safetensors")),
    "old weights only": (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), ("B301", "pytorch_model.bin")),
    "weights cut short": (lambda m: cut(m / "model.safetensors"), ("B304", "model.safetensors")),
    "weights not safetensors": (lambda m: (m / "model.safetensors").write_bytes(b"\0" * 64), ("B304", "model.safetensors")),
    "a block missing": (
        lambda m: change_weights(m / "model.safetensors", lambda t: [t.pop(n) for n in list(t) if "layers.1." in n]),
        ("B304", "layers.1."),
    ),
    "a norm missing": (
        lambda m: change_weights(m / "model.safetensors", lambda t: t.pop("model.norm.weight")), ("B304", "model.norm.weight"),
    ),
    "a weight of another size": (lambda m: edit(m / "config.json", intermediate_size=64), ("B304",)),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("token*")], ("B303", "tokenizer")),
    "tokenizer not JSON": (lambda m: (m / "tokenizer.json").write_text("{"), ("B303", "tokenizer")),
    "tokenizer of another model": (lambda m: edit_vocabulary(m / "tokenizer.json"), ("B303", "more tokens than the model", "500")),
}  # fmt: skip
ADAPTERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "folder misspelt": (lambda a: a.rename(a.parent / "adapterr"), ("A402", "adapter_config.json", "adapterr")),
    "no config": (lambda a: (a / "adapter_config.json").unlink(), ("A402", "adapter_config.json")),
    "config not JSON": (lambda a: (a / "adapter_config.json").write_text("{"), ("A402", "not JSON")),
    "config a list": (lambda a: (a / "adapter_config.json").write_text("[]"), ("A402", "not an object")),
    "prefix tuning": (lambda a: edit(a / "adapter_config.json", peft_type="PREFIX_TUNING"), ("A402", "PREFIX_TUNING")),
    "dora": (lambda a: edit(a / "adapter_config.json", use_dora=True), ("A402", "use_dora")),
    "other modules saved": (lambda a: edit(a / "adapter_config.json", modules_to_save=["lm_head"]), ("A402", "modules_to_save")),
    "biases": (lambda a: edit(a / "adapter_config.json", bias="all"), ("A402", "bias")),
    "alpha is text": (lambda a: edit(a / "adapter_config.json", lora_alpha="4"), ("A402", "lora_alpha")),
    "rank disagrees": (lambda a: edit(a / "adapter_config.json", r=8), ("A402", "_proj", "rank 8")),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), ("A402", "adapter_model.safetensors")),
    "weights cut short": (lambda a: cut(a / "adapter_model.safetensors"), ("A402", "cannot be read")),
    "half a pair": (lambda a: change_weights(a / "adapter_model.safetensors", lambda t: t.pop(Q)), ("A402", "half a LoRA pair", "q_proj")),
    "a foreign tensor": (
        lambda a: change_weights(a / "adapter_model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(2, 2)})),
        ("A402", "lm_head.weight"),
    ),
    "nothing in it": (lambda a: change_weights(a / "adapter_model.safetensors", lambda t: t.clear()), ("A402", "no tensors")),
    "of a larger base": (
        lambda a: save_adapter(fresh_adapters("lora", {"model.layers.0.self_attn.q_proj": (64, 64)},
                                              {"model.layers.0.self_attn.q_proj": 2}, 4, 0), a, base_name="x"),
        ("A403", "another base", "(64, 64)"),
    ),
    "of a deeper base": (
        lambda a: save_adapter(fresh_adapters("lora", {"model.layers.7.self_attn.q_proj": (32, 32)},
                                              {"model.layers.7.self_attn.q_proj": 2}, 4, 0), a, base_name="x"),
        ("A403", "model.layers.7.self_attn.q_proj"),
    ),
    "of another kind": (
        lambda a: save_adapter(fresh_adapters("bottleneck", SIZES, dict.fromkeys(SIZES, 2), 4, 0), a, base_name="x"),
        ("A403", 'kind = "bottleneck"'),
    ),
}  # fmt: skip
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "misspelt": ('["q_porj"]', ("A401", "q_porj", "did you mean 'q_proj'?")),
    "of another family": ('["c_attn"]', ("A401", "c_attn", "q_proj")),
    "positions": ('["wpe"]', ("A401", "wpe", "stay frozen")),
    "a group misspelt": ('"all-liner"', ("A401", "all-linear")),
    "one of two": ('["q_proj", "x_proj"]', ("A401", "'x_proj'")),
}


def edit_vocabulary(path: Path) -> None:
    """Give the tokenizer a token beyond the model's embedding."""
    value = json.loads(path.read_text())
    value["model"]["vocab"]["beyond"] = 500
    path.write_text(json.dumps(value))


def refuse(atoll: Callable[..., object], folder: Path, toml: str, says: tuple[str, ...]) -> None:
    """Train, and expect exit 2, one page that says all of this, and no file more than before."""
    (folder / "run.toml").write_text(toml)
    before = sorted(folder.rglob("*"))
    outcome = atoll("train", folder / "run.toml")
    assert (outcome.status, outcome.out) == (2, ""), outcome.err  # type: ignore[attr-defined]
    assert outcome.err.count("error ") == 1  # type: ignore[attr-defined]
    assert "Traceback" not in outcome.err  # type: ignore[attr-defined]
    for part in (*says, "got", "do "):
        assert part in outcome.err, outcome.err  # type: ignore[attr-defined]
    assert sorted(folder.rglob("*")) == before


def copy(good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "case"
    shutil.copytree(good, folder)
    return folder


TOML = (
    '[model]\nbase = "./model"\n[data]\ntrain = "train.csv"\nprompt = "{a}"\ncompletion = "{b}"\n'
    '[train]\nlocal_steps = 1\n[run]\nrounds = 1\n'
)


@pytest.mark.parametrize("case", sorted(MODELS))
def test_wrong_model_folders(case: str, good: Path, tmp_path: Path, atoll: Callable[..., object]) -> None:
    folder, (spoil, says) = copy(good, tmp_path), MODELS[case]
    spoil(folder / "model")
    refuse(atoll, folder, TOML, says)


@pytest.mark.parametrize("case", sorted(ADAPTERS))
def test_wrong_adapters_to_start_from(case: str, good: Path, tmp_path: Path, atoll: Callable[..., object]) -> None:
    folder, (spoil, says) = copy(good, tmp_path), ADAPTERS[case]
    spoil(folder / "adapter")
    refuse(atoll, folder, TOML + '[adapter]\nstart = "adapter"\n', says)


@pytest.mark.parametrize("case", sorted(TARGETS))
def test_wrong_targets(case: str, good: Path, tmp_path: Path, atoll: Callable[..., object]) -> None:
    targets, says = TARGETS[case]
    refuse(atoll, copy(good, tmp_path), f"{TOML}[adapter]\ntargets = {targets}\n", says)


def test_wrong_places_to_write_and_to_read(good: Path, tmp_path: Path, atoll: Callable[..., object]) -> None:
    folder = copy(good, tmp_path)
    (folder / "run.toml").write_text(TOML)
    cases = [
        (("train", folder / "run.toml", "--out", folder), ("R502", "empty")),
        (("evaluate", folder), ("R501",)),
        (("generate", folder / "nowhere", "w1"), ("R501",)),
        (("merge", folder, "--out", tmp_path / "merged"), ("R501",)),
        (("export", folder, "--for", "vllm", "--out", tmp_path / "merged"), ("R501",)),
        (("evaluate", "--model", folder / "model"), ("D204", "--data")),
        (("evaluate", "--model", folder / "model", "--data", folder / "train.csv"), ("columns",)),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, says in cases:
        outcome = atoll(*arguments)
        assert outcome.status == 2, outcome  # type: ignore[attr-defined]
        assert all(part in outcome.err for part in says), outcome.err  # type: ignore[attr-defined]
        assert "Traceback" not in outcome.err  # type: ignore[attr-defined]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_good_folder_is_good(good: Path, tmp_path: Path, atoll: Callable[..., object]) -> None:
    """What the cases above spoil does train, so that it is the spoiling that is refused."""
    folder = copy(good, tmp_path)
    (folder / "run.toml").write_text(TOML + '[adapter]\nstart = "adapter"\n')
    outcome = atoll("train", folder / "run.toml", "--out", tmp_path / "run")
    assert outcome.status == 0, outcome.err  # type: ignore[attr-defined]
    assert random_model("llama").config.hidden_size == 32
