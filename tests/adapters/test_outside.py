"""Adapters on embedding and head: gradients are PEFT's, training and its result as with other modules, in every family."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import atoll
from atoll.adapters.attach import attached
from atoll.adapters.peft_files import load_adapter
from atoll.adapters.targets import named_outside, resolve_targets
from atoll.base.head import loss_sum
from atoll.base.load import load_base
from atoll.base.read_shapes import read_shapes
from atoll.errors import ConflictError, TargetError
from atoll.shapes import with_outside

from tests.base.test_head import rows
from tests.conftest import random_model, save_model_folder, write_job
from tests.families import save
from tests.run_files import write_rows, write_run

ONE: dict[str, dict[str, object]] = {"run": {"rounds": 2}, "train": {"local_steps": 2}}
IDS = torch.arange(24).view(2, 12) * 3 % 96


def names_of(family: str) -> list[str]:
    model = random_model(family)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]]


def test_shapes_say_where_they_are(family: str, tmp_path: Path) -> None:
    save_model_folder(tmp_path, family)
    model, shapes = random_model(family), read_shapes(str(tmp_path))
    assert [module.name for module in shapes.outside] == names_of(family)
    embedding, head = shapes.outside
    assert (embedding.d_in, embedding.d_out) == tuple(model.get_input_embeddings().weight.shape)  # type: ignore[union-attr, arg-type]
    assert (head.d_out, head.d_in) == tuple(model.get_output_embeddings().weight.shape)  # type: ignore[union-attr, arg-type]
    assert not named_outside("all-linear", shapes.outside)
    both = with_outside(shapes, names_of(family))
    assert resolve_targets("all-linear", both.modules) == tuple(module.name for module in shapes.modules)
    assert set(resolve_targets(names_of(family), both.modules)) == set(names_of(family))


@pytest.mark.parametrize("parts", [[0], [1], [0, 1]])
def test_gradients_are_pefts(family: str, parts: list[int], tmp_path: Path) -> None:
    targets = [names_of(family)[part] for part in parts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(random_model(family), LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"))
    g = torch.Generator().manual_seed(1)
    leaves = {name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
    for parameter in leaves.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    batch = rows()
    loss = theirs(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss * len(batch.target_N)
    loss.backward()
    model = random_model(family)
    with attached(model, load_adapter(tmp_path)) as ours:
        mine = loss_sum(model, batch)
        mine.backward()
        torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-4)
        for name, layer in ours.layers.items():
            for matrix, letter in ((layer.down_RI, "A"), (layer.up_OR, "B")):
                (key,) = (key for key in leaves if f".{name}.lora_{letter}." in key or f".{name}.lora_embedding_{letter}." in key)
                torch.testing.assert_close(matrix.grad, leaves[key].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("edge", [{"mode": "local"}, {"mode": "split"}], ids=["local", "split"])
@pytest.mark.parametrize("select", [{}, {"policy": "kill-and-revive", "observe_steps": 1, "every": 2}], ids=["all", "some"])
def test_they_are_trained_and_the_result_is_pefts(edge: dict[str, object], select: dict[str, object], tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    toml = write_job(tmp_path, {**ONE, "adapter": {"targets": targets}, "select": select}, {"north": edge, "south": {**edge, "rank": 2}})
    run = atoll.train(toml, out=tmp_path / "run")
    state = load_adapter(run.adapter)
    assert {"model.embed_tokens", "lm_head"} < state.modules.keys()
    assert all(state.modules[name].delta_OI().abs().max() > 1e-4 for name in ("model.embed_tokens", "lm_head"))
    evaluation: Any = run.summary.eval
    assert evaluation.adapted["loss"] < evaluation.base["loss"]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run.adapter).eval()(IDS).logits
        torch.testing.assert_close(atoll.load(run.run_dir)(IDS).logits, theirs)
        merged = AutoModelForCausalLM.from_pretrained(atoll.merge(run.run_dir, out=tmp_path / "merged"))(IDS).logits
    torch.testing.assert_close(merged, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "cohere", "gpt_bigcode", "mamba2", "granitemoehybrid", "rwkv", "llava"])
def test_they_are_trained_in_families_that_only_the_model_tells_of(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 6)
    targets = [module.name for module in read_shapes(str(tmp_path / "base")).outside]
    assert len(targets) == 2
    toml = write_run(tmp_path, {**ONE, "data": {"eval": None, "max_length": 48}, "adapter": {"targets": targets}}, {"north": {}})
    run = atoll.train(toml, out=tmp_path / "run")
    state, ids = load_adapter(run.adapter), torch.arange(40, 52)[None]
    assert set(state.modules) == set(targets)
    base = load_base(str(tmp_path / "base")).model
    with torch.no_grad():
        with attached(base, state):
            ours = base(ids).logits
        theirs = atoll.load(run.run_dir)(ids).logits
        assert (theirs - base(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_from_them(tmp_path: Path) -> None:
    first = atoll.train(write_job(tmp_path, {**ONE, "adapter": {"targets": ["embed_tokens", "lm_head"]}}), out=tmp_path / "first")
    second = write_job(tmp_path, {**ONE, "adapter": {"start": str(first.adapter)}})
    assert "lm_head" in atoll.plan(second).pool
    run = atoll.train(second, out=tmp_path / "second")
    assert load_adapter(run.adapter).ranks == load_adapter(first.adapter).ranks


def test_where_nobody_can_say_they_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match="embedding and head"):
        atoll.plan(write_job(tmp_path, {**ONE, "adapter": {"targets": ["lm_head"]}, "plan": {"policy": "fedpipe"}}))
    for kind in ("full", "bottleneck"):
        with pytest.raises(TargetError):
            atoll.plan(write_job(tmp_path, {**ONE, "adapter": {"targets": ["lm_head"], "kind": kind}}))
