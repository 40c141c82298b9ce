"""Instructions, as Alpaca has them, planned and trained over two kinds of machine without a template in run.toml."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import atoll
from atoll.base.load import load_base
from atoll.config.schema import Data, Evaluate
from atoll.tasks.evaluate import evaluate
from atoll.tasks.rows import load_rows
from atoll.tasks.text import text_form

from tests.run_files import write_run


def test_alpaca_is_learned_by_planned_machines_and_peft_says_the_same(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base, data = shared / "models" / "house-4M", shared / "data" / "alpaca" / "alpaca_5000.json"
    if not base.is_dir() or not data.is_file():
        pytest.skip("no such base or data in ../shared")
    config = write_run(
        tmp_path,
        {
            "model": {"base": str(base)}, "plan": {"warmup_steps": 2, "ranks": [2, 4]}, "train": {"learning_rate": 5e-3, "local_steps": 4},
            "data": {"train": str(data), "eval": str(data), "max_length": 256, "train_rows": 64, "eval_rows": 8},
        },
        {"large": {"flops": "2 GFLOP/s"}, "small": {"memory": "318 MB", "process_memory": "300 MB", "flops": "1 GFLOP/s"}},
    )  # fmt: skip
    run = atoll.train(config, out=tmp_path / "run", overrides=["method=fedpipe"])
    large, small = run.summary.edges
    assert (large.bits, small.bits < 16) == (16, True)
    assert large.steps > small.steps
    before, after = run.summary.eval.base, run.summary.eval.adapted or {}
    assert after["loss"] < before["loss"] - 0.1

    loaded = load_base(str(base))
    rows = load_rows(str(data), base_dir=tmp_path, limit=8, on_bad_row="skip")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(run.adapter)).merge_and_unload()
    loaded.model.load_state_dict(merged.state_dict())
    scores = evaluate(loaded, rows, text_form(Data(), rows.columns), Evaluate(), max_length=256)
    assert scores["loss"] == pytest.approx(after["loss"], abs=1e-4)
