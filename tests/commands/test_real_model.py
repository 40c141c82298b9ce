"""A pretrained model on real rows, where there are any: a few steps of four edges, and PEFT's loss beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import atoll

TOML = """
[run]
rounds = 2
[model]
base = "{shared}/models/stories260K"
[data]
train = "{shared}/data/e2e/trainset.csv"
eval = "{shared}/data/e2e/devset.csv"
prompt = "{{mr}} ->"
completion = " {{ref}}"
train_rows = 200
eval_rows = 16
[adapter]
rank = 16
[train]
learning_rate = 1e-2
local_steps = 4
"""


def test_stories_on_e2e(shared: Path, tmp_path: Path) -> None:
    edges = "".join(f'[[edge]]\nname = "{name}"\n' for name in ("north", "east", "south", "west"))
    (tmp_path / "run.toml").write_text(TOML.format(shared=shared) + edges)
    run = atoll.train(tmp_path / "run.toml", out=tmp_path / "run")
    base, adapted = run.summary.eval.base or {}, run.summary.eval.adapted or {}
    assert adapted["loss"] < base["loss"] - 1.0
    folder = shared / "models" / "stories260K"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(run.adapter)).eval()
    assert peft_loss(model, folder, shared / "data" / "e2e" / "devset.csv") == pytest.approx(adapted["loss"], abs=1e-5)


def peft_loss(model: PeftModel, folder: Path, rows: Path) -> float:
    """The mean loss over completion tokens by PEFT and transformers alone, with labels of -100 on the prompts."""
    import csv
    import itertools

    tokenizer, total, count = AutoTokenizer.from_pretrained(folder), 0.0, 0
    with rows.open(encoding="utf-8") as file, torch.no_grad():
        for row in itertools.islice(csv.DictReader(file), 16):
            prompt = tokenizer(f"{row['mr']} ->")["input_ids"]
            ids = tokenizer(f"{row['mr']} -> {row['ref']}")["input_ids"]
            ids = [*ids, tokenizer.eos_token_id][:256]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            num = len(ids) - len(prompt)
            total += float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss) * num
            count += num
    return total / count
