"""A pretrained model on real rows, where there are any: a few steps of four edges, and PEFT's loss beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import atoll

from tests.run_files import Sections, write_run


def test_stories_on_e2e(shared: Path, tmp_path: Path) -> None:
    e2e = {part: str(shared / "data" / "e2e" / f"{name}.csv") for part, name in (("train", "trainset"), ("eval", "devset"))}
    sections: Sections = {
        "model": {"base": str(shared / "models" / "stories260K")}, "adapter": {"rank": 16}, "train": {"local_steps": 4, "batch_size": None},
        "data": {**e2e, "prompt": "{mr} ->", "completion": " {ref}", "max_length": None, "train_rows": 200, "eval_rows": 16},
    }  # fmt: skip
    run = atoll.train(write_run(tmp_path, sections, {name: {} for name in ("north", "east", "south", "west")}), out=tmp_path / "run")
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
