"""What comes of a run is of the base that it was trained on, loads in PEFT, and keeps the base's types."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import atoll
from atoll.adapters.attach import merge_into
from atoll.adapters.peft_files import load_adapter, save_adapter
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.base.part import part_digest, stored_digest
from atoll.errors import AdapterFitError, BaseFolderError, OtherBaseError, TargetError

from tests.conftest import random_model, write_job

ONE: dict[str, dict[str, object]] = {"run": {"rounds": 1}, "train": {"local_steps": 2}}
IDS = torch.arange(24).view(2, 12) * 3 % 96
USES: dict[str, Callable[..., object]] = {
    "evaluate": lambda run, out, **given: atoll.evaluate(run_dir=run, **given),
    "generate": lambda run, out, **given: atoll.generate(run, "w3 w4", max_new_tokens=2, **given),
    "merge": lambda run, out, **given: atoll.merge(run, out=out, **given),
    "load": lambda run, out, **given: atoll.load(run, **given),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run and its base."""
    folder = tmp_path_factory.mktemp("trained")
    atoll.train(write_job(folder, ONE), out=folder / "run")
    return folder


@pytest.fixture
def moved(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, the config of whose run says that it was always there. No hub is asked for a base that is not."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = Path(shutil.copytree(trained, tmp_path / "moved"))
    file = folder / "run" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "folder": str(folder)}))
    return folder


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("use", USES)
def test_a_result_is_used_with_the_base_it_was_trained_on(use: str, moved: Path) -> None:
    USES[use](moved / "run", moved / "before")
    change(moved, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][0].add_(1e-3))
    with pytest.raises(OtherBaseError) as caught:
        USES[use](moved / "run", moved / "out")
    assert "--other-base" in caught.value.do
    assert not (moved / "out").exists()
    USES[use](moved / "run", moved / "after", other_base=True)


def swap_two_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w3":', '"w_":').replace('"w4":', '"w3":').replace('"w_":', '"w4":'))


def set_in_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


OTHERWISE: dict[str, Callable[[Path], None]] = {
    "rms_norm_eps = 0.1, where it was": lambda base: set_in_config(base, rms_norm_eps=0.1),
    "rope_theta = 7": lambda base: set_in_config(base, rope_parameters={"rope_type": "default", "rope_theta": 7.0}),
    "another tokenizer": swap_two_tokens,
}


@pytest.mark.parametrize("got", OTHERWISE)
def test_the_same_weights_with_other_settings_or_another_tokenizer_are_another_base(got: str, moved: Path) -> None:
    before = stored_digest(str(moved / "base")), part_digest(str(moved / "base"), 0, 1)
    set_in_config(moved / "base", transformers_version="9.9", architectures=None)
    atoll.load(moved / "run")
    assert before == (stored_digest(str(moved / "base")), part_digest(str(moved / "base"), 0, 1))
    OTHERWISE[got](moved / "base")
    for use in USES.values():
        with pytest.raises(OtherBaseError) as caught:
            use(moved / "run", moved / "out")
        assert got in caught.value.got
        use(moved / "run", moved / "out", other_base=True)
        shutil.rmtree(moved / "out", ignore_errors=True)
    assert before[0] != stored_digest(str(moved / "base")), "on a fleet, too"
    # A host compares the tokenizer by itself.
    assert (before[1] == part_digest(str(moved / "base"), 0, 1)) == (got == "another tokenizer")


@pytest.mark.parametrize("use", USES)
def test_a_base_that_was_moved_is_named(use: str, moved: Path) -> None:
    (moved / "base").rename(moved / "elsewhere")
    with pytest.raises(BaseFolderError):
        USES[use](moved / "run", moved / "out")
    place = str(moved / "elsewhere")
    given: dict[str, object] = {"overrides": [f"model.base={place}"]} if use == "evaluate" else {"model": place}
    USES[use](moved / "run", moved / "out", **given)


def test_an_adapter_in_a_runs_folder_is_of_its_base(moved: Path) -> None:
    def evaluate(adapter: Path, **given: Any) -> object:
        rows = {"data": str(moved / "rows.jsonl"), "overrides": ["data.max_length=16"]}
        return atoll.evaluate(model=str(moved / "base"), adapter=adapter, **rows, **given)  # type: ignore[arg-type]

    checkpoint = next((moved / "run" / "checkpoints").iterdir())
    assert evaluate(moved / "run" / "adapter") == evaluate(checkpoint)
    change(moved, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    for adapter in (moved / "run" / "adapter", checkpoint):
        with pytest.raises(OtherBaseError):
            evaluate(adapter)
        evaluate(adapter, other_base=True)
    shutil.copytree(moved / "run" / "adapter", moved / "alone")
    evaluate(moved / "alone")


def test_a_run_that_starts_from_an_adapter_of_another_base_says_so(moved: Path) -> None:
    toml = moved / "run.toml"
    toml.write_text(toml.read_text() + '[adapter]\nstart = "run/adapter"\n')

    def told(out: str) -> list[str]:
        events = (moved / out / "events.jsonl").read_text().splitlines()
        return [line for line in events if "trained on another base" in line]

    atoll.train(toml, out=moved / "same")
    change(moved, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    atoll.train(toml, out=moved / "other")
    assert (told("same"), len(told("other"))) == ([], 1)


def test_older_runs_kept_one_hash(moved: Path) -> None:
    file = moved / "run" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "base": None}))
    atoll.load(moved / "run")
    file.write_text(json.dumps({**values, "base": None, "hashes": None}))
    with pytest.raises(OtherBaseError, match="not the one"):
        atoll.load(moved / "run")


def test_of_a_base_in_a_host_the_devices_part_is_compared(tmp_path: Path) -> None:
    edges = {"north": {"mode": "split"}}
    atoll.train(write_job(tmp_path, ONE, edges), out=tmp_path / "run")
    scores = atoll.evaluate(run_dir=tmp_path / "run")
    assert scores["adapted"] != scores["base"]
    change(tmp_path, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    with pytest.raises(OtherBaseError):
        atoll.evaluate(run_dir=tmp_path / "run")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["as-stored", "fp32", "bf16", "fp16"])
def test_a_merged_model_has_the_types_of_its_base(stored: torch.dtype, dtype: Any, tmp_path: Path) -> None:
    toml = write_job(tmp_path, ONE)
    change(tmp_path, lambda tensors: tensors.update({
        name: tensor if "norm" in name else tensor.to(stored) for name, tensor in tensors.items()
    }))  # fmt: skip
    run = atoll.train(toml, out=tmp_path / "run")
    merged = atoll.merge(run.run_dir, out=tmp_path / "merged", dtype=dtype)
    wanted = {"as-stored": stored, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, tensor in load_file(merged / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if dtype == "as-stored" and "norm" in name else wanted), name
    assert AutoConfig.from_pretrained(merged).dtype == wanted
    ours = atoll.load(run.run_dir)(IDS).logits
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if wanted == torch.float32 else 2e-2)


def test_a_merged_weight_that_its_type_cannot_hold_is_refused(moved: Path) -> None:
    change(moved, lambda tensors: tensors["model.embed_tokens.weight"].view(-1)[:1].fill_(1e5))
    with pytest.raises(AdapterFitError, match="too large"):
        atoll.merge(moved / "run", out=moved / "out", other_base=True, dtype="fp16")
    assert not (moved / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("parts", ["embedding", "head", "both"])
def test_embedding_and_head_are_merged_each_by_itself(family: str, parts: str, tmp_path: Path) -> None:
    model, g, modules = random_model(family), torch.Generator().manual_seed(0), {}
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    if parts != "head":
        modules[embedding] = ModuleAdapter(torch.randn(2, 96, generator=g), torch.randn(32, 2, generator=g), 0.5)
    if parts != "embedding":
        modules[head] = ModuleAdapter(torch.randn(3, 32, generator=g), torch.randn(96, 3, generator=g), 0.5)
    save_adapter(AdapterState("lora", modules), tmp_path / "adapter", base_name="x", embeddings={embedding}, transposed=family == "gpt2")
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(random_model(family), tmp_path / "adapter").eval()(IDS).logits
        merge_into(model, load_adapter(tmp_path / "adapter"))
        torch.testing.assert_close(model(IDS).logits, theirs, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(again, theirs, rtol=1e-4, atol=1e-4)


def test_what_peft_cannot_load_is_not_trained(tmp_path: Path) -> None:
    toml = write_job(tmp_path, {**ONE, "adapter": {"targets": ["in_proj", "out_proj"]}}, {"north": {}})
    config = AutoConfig.for_model(
        "mamba2", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=16, expand=2, n_groups=1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises((AdapterFitError, TargetError)) as caught:
        atoll.train(toml, out=tmp_path / "run")
    assert "out_proj" in caught.value.got
    assert not (tmp_path / "run").exists()
    run = atoll.train(toml, out=tmp_path / "run", overrides=["adapter.targets=['in_proj']"])
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run.adapter)


def test_an_adapter_to_start_from_means_what_peft_makes_of_it(tmp_path: Path) -> None:
    toml = write_job(tmp_path, {**ONE, "adapter": {"start": "start"}})
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )  # fmt: skip
    model.save_pretrained(tmp_path / "start")
    atoll.train(toml, out=tmp_path / "run")
    file = tmp_path / "start" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(Exception, match="variant of LoRA"):
        atoll.train(toml, out=tmp_path / "other")


@pytest.mark.parametrize("base", ["base", "some/base"])
def test_a_base_lies_beside_run_toml_and_nowhere_else(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    project.mkdir()
    toml = write_job(project, {**ONE, "model": {"base": base}}, {"north": {}})
    (tmp_path / base).parent.mkdir(exist_ok=True)
    (project / "base").rename(tmp_path / base)
    monkeypatch.chdir(tmp_path)
    for use in (atoll.train, atoll.plan):
        with pytest.raises(BaseFolderError, match=r"not beside run\.toml"):
            use(toml)
    (project / base).parent.mkdir(exist_ok=True)
    (tmp_path / base).rename(project / base)
    atoll.train(toml, out=tmp_path / "run")
    atoll.evaluate(model=str(project / base), data=str(project / "rows.jsonl"), overrides=["data.max_length=16"])
