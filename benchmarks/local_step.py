"""Atoll's local step against Hugging Face Trainer + PEFT LoRA: same model, adapter, batches, order, precision, threads and optimizer.

Every measurement is a pair of fresh processes that take turns step by step, so that both see the same machine, fast or slow.
Ratios of medians are what counts.

Usage: python benchmarks/local_step.py [--repeats 5] [--only stories260K 15M]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from sides import results, task
from sides.options import Options

SIDES = {"atoll": "sides.ours", "trainer": "sides.trainer"}
CASES = {"stories260K": (8, 40, 10), "15M": (8, 24, 6), task.TINY: (2, 3, 1)}
"""Batch size, steps, and the first of them that are not counted."""
GOALS = {"tokens_per_second": 1.2, "peak_bytes": 0.8}
SAME_LOSS = 2e-3
"""Largest relative difference of the two sides' losses over all steps; more would mean that they do not do the same work."""


def measure(folder: Path, case: tuple[int, int, int], *flags: str) -> dict[str, dict[str, Any]]:
    """Both sides' figures: two fresh processes, which take turns step by step."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    with tempfile.TemporaryFile("w+") as problems:
        sides = {
            side: subprocess.Popen(
                [sys.executable, "-m", module, str(folder), *map(str, case), *flags], cwd=Path(__file__).parent, env=os.environ | offline,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=problems, text=True,
            )
            for side, module in SIDES.items()
        }  # fmt: skip
        try:
            lines = {side: _read(process, problems) for side, process in sides.items()}
            for _ in range(case[1] + 1):
                for side, process in sides.items():
                    assert process.stdin is not None
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    lines[side] = _read(process, problems)
        finally:
            for process in sides.values():
                process.kill()
    return {side: json.loads(line) for side, line in lines.items()}


def _read(process: subprocess.Popen[str], problems: IO[str]) -> str:
    """What the process says when it waits for its turn, or at its end."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("ready", '{"')):  # The Trainer prints lines of its own.
            return line
    problems.seek(0)
    raise SystemExit(f"a side failed:\n{problems.read()[-3000:]}")


def counted_tokens(folder: Path, case: tuple[int, int, int]) -> int:
    """Tokens without padding in the steps that are counted."""
    stored = np.load(folder / "batches.npz")
    return sum(int(stored[f"lengths{step}"].sum()) for step in range(case[2], case[1]))


def compare(model: str, repeats: int) -> dict[str, Any]:
    """Both sides in turns on one model."""
    case = CASES[model]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task.prepare(model, folder, num_rows=2 * case[0] * case[1], batch_size=case[0], num_steps=case[1])
        tokens = counted_tokens(folder, case)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        with_parts = measure(folder, case, "--parts")
        for repeat, pair in enumerate([measure(folder, case) for _ in range(repeats)] or [with_parts]):
            for side, run in pair.items():
                run["tokens_per_second"] = tokens / run["seconds"]
                runs[side].append(run)
                print(
                    f"{model} {repeat + 1} {side:8} {run['tokens_per_second']:8.0f} tokens/s,"
                    f" peak {run['peak_bytes'] / 1e6:5.0f} MB, of it {run['rise_bytes'] / 1e6:5.0f} MB while training,"
                    f" CPU {run['cpu_seconds']:.1f} s", flush=True,
                )  # fmt: skip
        parts = {side: run["parts_seconds"] for side, run in with_parts.items()}
    return summary(runs, parts, case, tokens)


def summary(runs: dict[str, list[dict[str, Any]]], parts: dict[str, Any], case: tuple[int, int, int], tokens: int) -> dict[str, Any]:
    """Medians, ratios (Atoll to Trainer), whether the goals are met, where the time goes, and every repeat."""
    ours, theirs = (np.array(runs[side][0]["losses"]) for side in SIDES)
    difference = float(np.max(np.abs(ours - theirs) / theirs))
    assert difference < SAME_LOSS, f"the two sides do not train the same: losses differ by {difference}"
    keys = ("tokens_per_second", "cpu_seconds", "peak_bytes", "before_bytes", "rise_bytes")
    medians = {side: {key: statistics.median(run[key] for run in runs[side]) for key in keys} for side in SIDES}
    ratios = {key: medians["atoll"][key] / medians["trainer"][key] for key in keys}
    per_step = {side: {part: 1e3 * s / (case[1] - case[2]) for part, s in spent.items()} for side, spent in parts.items()}
    repeats = {side: [{key: run[key] for key in (*keys, "seconds")} for run in runs[side]] for side in SIDES}
    return {
        "ratios": ratios, "goals_met": {"tokens_per_second": ratios["tokens_per_second"] >= 1.2, "peak_bytes": ratios["peak_bytes"] <= 0.8},
        "medians": medians, "counted_tokens": tokens, "largest_relative_loss_difference": difference,
        "milliseconds_per_step_by_part": per_step, "repeats": repeats,
    }  # fmt: skip


def main() -> None:
    """Measure, print and keep."""
    options, usual = Options(__doc__), ["stories260K", "15M"]
    options.size("--repeats", 5, 0, help="without timers of parts; 0: the figures are those of the pair that has them")
    options.size("--only", usual, [task.TINY], choices=tuple(CASES))
    given = options.parse()
    found = {model: compare(model, given.repeats) for model in given.only}
    for model, result in found.items():
        ratios = result["ratios"]
        print(f"{model}: tokens/s x {ratios['tokens_per_second']:.2f} (goal 1.2), peak memory x {ratios['peak_bytes']:.2f} (goal 0.8),"
              f" rise while training x {ratios['rise_bytes']:.2f}, CPU time x {ratios['cpu_seconds']:.2f}")  # fmt: skip
        for side, parts in result["milliseconds_per_step_by_part"].items():
            print(f"  {side:8}" + ", ".join(f"{part} {ms:.1f} ms" for part, ms in parts.items()))
    config = {
        "cases": {model: dict(zip(("batch_size", "steps", "warmup_steps"), CASES[model], strict=True)) for model in found},
        "repeats": given.repeats, "threads": 2, "precision": "fp32", "lora": {"rank": task.RANK, "alpha": task.ALPHA,
        "targets": "all-linear"}, "optimizer": "AdamW, cosine from 1e-3, no decay, clipping at 1", "data": "E2E trainset, completion only",
        "goals": GOALS, "random_15M": task.RANDOM_15M,
    }  # fmt: skip
    results.write(given.out, "local_step" if given.only == usual else f"local_step_{'_'.join(given.only)}", config, found)


if __name__ == "__main__":
    main()
