"""Families whose checkpoints have other tensors than the model, or whose blocks are a part of a whole: split training is the local one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import atoll

from tests.families import save
from tests.run_files import write_rows, write_run

CUT = {"run": {"rounds": 1, "placement": "split"}, "model": {"cut": {"front": 1, "back": 1}}}
ALIKE = ["mixtral", "deepseek_v3", "qwen2_moe", "granitemoehybrid", "gpt_oss", "gemma3", "llava", "qwen3_5", "llama4", "falcon_h1"]


@pytest.mark.parametrize("name", ALIKE)
def test_split_training_is_the_local_one(tmp_path: Path, name: str) -> None:
    save(name, tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 8)
    local = atoll.train(write_run(tmp_path, {"run": {"rounds": 1}, "data": {"eval": None, "max_length": 32}}, {"x": {}}))
    split = atoll.train(write_run(tmp_path, {**CUT, "data": {"eval": None, "max_length": 32}}, {"x": {}}))
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (split, local))
    assert ours.keys() == theirs.keys()
    for module, tensor in theirs.items():
        torch.testing.assert_close(ours[module], tensor, rtol=1e-3, atol=1e-5)
