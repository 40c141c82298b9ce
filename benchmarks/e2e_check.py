"""The run of e2e_stories.toml, and its adapter in plain PEFT: the same loss to 1e-5 of it, by transformers' own loss over labels of -100.

Nothing of Atoll is imported to compute the loss: rows, tokens, batches and masks are made here anew.

Usage: python benchmarks/e2e_check.py [RUN_DIR]      (default: train into a temporary folder first)
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from itertools import islice
from pathlib import Path
from typing import Any

from sides import needs, results
from sides.options import Options

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

CONFIG = Path(__file__).parent / "e2e_stories.toml"
TOLERANCE = 1e-5
"""Largest relative difference of the two losses."""
GOAL_SECONDS, BATCH_ROWS = 600.0, 25


def label_rows(config: dict[str, Any], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Held-out rows as (token ids, labels): begin token, prompt without loss, completion and end token with loss."""
    data, rows = config["data"], []
    with open(CONFIG.parent / data["eval"], encoding="utf-8", newline="") as file:
        for row in islice(csv.DictReader(file), data["eval_rows"]):
            prompt, completion = data["prompt"].format(**row), data["completion"].format(**row)
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            both_ids = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
            whole = both_ids[: len(prompt_ids)] == prompt_ids
            answer_ids = both_ids[len(prompt_ids) :] if whole else tokenizer(completion, add_special_tokens=False)["input_ids"]
            ids = [tokenizer.bos_token_id, *prompt_ids, *answer_ids, tokenizer.eos_token_id]
            labels = [-100] * (1 + len(prompt_ids)) + [*answer_ids, tokenizer.eos_token_id]
            rows.append((ids[: data["max_length"]], labels[: data["max_length"]]))
    return rows


def plain_loss(config: dict[str, Any], adapter: Path | None) -> tuple[float, int]:
    """(nats per label token, label tokens) of the base, or of base and adapter, by transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    base = CONFIG.parent / config["model"]["base"]
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter is not None else model
    rows, total, count = label_rows(config, AutoTokenizer.from_pretrained(base)), 0.0, 0
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        width = max(len(ids) for ids, _ in part)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in part])
        num_labels = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model.eval()(input_ids=input_ids, attention_mask=mask, labels=labels).loss) * num_labels
        count += num_labels
    return total / count, count


def check(run: Path, config: dict[str, Any], goal_loss: float, out: Path, seconds: float | None) -> None:
    """Compare, print and keep."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    theirs, count = plain_loss(config, run / "adapter")
    base_loss, _ = plain_loss(config, None)
    ours = summary["eval"]["adapted"]["loss"]
    difference = abs(theirs - ours) / ours
    wall = summary["seconds"]["wall"] if seconds is None else seconds
    print(f"base    {summary['eval']['base']['loss']:.7f} nats per token in Atoll, {base_loss:.7f} in transformers")
    print(f"adapted {ours:.7f} in Atoll, {theirs:.7f} in PEFT: relative difference {difference:.1e} (goal {TOLERANCE})")
    print(f"{count} label tokens; goal below {goal_loss}; the run took {wall:.0f} s, goal {GOAL_SECONDS:.0f} s")
    for edge in summary["edges"]:
        edge["ranks"] = sorted(set(edge["ranks"].values()))
    results.write(out, "e2e_stories", config, {
        "plain_peft": {"base_loss": base_loss, "adapted_loss": theirs, "relative_difference": difference, "num_label_tokens": count},
        "run_seconds": wall, "summary": summary,
    })  # fmt: skip
    assert count == summary["eval"]["adapted"]["num_label_tokens"], "other tokens"
    assert difference <= TOLERANCE, "another loss"
    assert ours < goal_loss, "the loss did not fall far enough"


def main() -> None:
    """Check a run, or a new one."""
    config = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    options = Options(__doc__)
    options.add_argument("run", nargs="?", type=Path, metavar="RUN_DIR")
    options.size("--rounds", config["run"]["rounds"], 1)
    options.size("--local-steps", config["train"]["local_steps"], 2)
    options.size("--warmup-steps", config["train"]["warmup_steps"], 0)
    options.size("--train-rows", config["data"]["train_rows"], 16)
    options.size("--eval-rows", config["data"]["eval_rows"], 4)
    options.size("--goal-loss", 1.2, math.inf)
    given = options.parse()
    needs.shared("models", "stories260K")
    needs.shared("data", "e2e")
    sizes = {"run": ("rounds",), "train": ("local_steps", "warmup_steps"), "data": ("train_rows", "eval_rows")}
    asked = {section: {key: getattr(given, key) for key in keys} for section, keys in sizes.items()}
    config |= {section: config[section] | values for section, values in asked.items()}
    if given.run is not None:
        check(given.run, config, given.goal_loss, given.out, None)
        return
    overrides = [word for section in asked for key, value in asked[section].items() for word in ("--set", f"{section}.{key}={value}")]
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "atoll", "train", str(CONFIG), "--out", f"{folder}/run", *overrides], check=True)
        check(Path(folder) / "run", config, given.goal_loss, given.out, time.monotonic() - start)


if __name__ == "__main__":
    main()
