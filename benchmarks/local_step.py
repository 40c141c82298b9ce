"""Atoll's local step against Hugging Face Trainer + PEFT LoRA: same model, adapter, batches, order, precision, threads and optimizer.

Every measurement is a pair of fresh processes that take turns step by step, so that both see the same machine, fast or slow.
Ratios of medians are what counts.

Of a base of real size a third process takes turns as well, which multiplies two matrices: what the machine could do at that moment.

Usage: python benchmarks/local_step.py [--repeats 5] [--only stories260K 15M] [--model SmolLM2-135M]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sides import product, results, task
from sides.options import Options

SIDES = {"atoll": "sides.ours", "trainer": "sides.trainer"}
PEAK = "sides.product"


@dataclass(frozen=True, slots=True)
class Case:
    """What both sides train on."""

    model: str
    batch_size: int
    steps: int
    warmup_steps: int
    """The first of the steps, which are not counted."""
    row_tokens: int = 256
    """Of a row at most."""
    texts: str = "e2e"
    beside_peak: bool = False
    """Whether the machine's speed at its best is measured in turns with the step."""

    @property
    def goals(self) -> dict[str, float]:
        """Ratios of Atoll to the Trainer; and of the speed that was reached to the machine's best."""
        if self.beside_peak:
            return {"tokens_per_second": 1.3, "peak_bytes": 0.7, "flops_per_second": 0.8}
        return {"tokens_per_second": 1.2, "peak_bytes": 0.8}

    @property
    def arguments(self) -> list[str]:
        """Of a side's command."""
        return [str(self.batch_size), str(self.steps), str(self.warmup_steps)]


CASES = {
    "stories260K": Case("stories260K", 8, 40, 10),
    "15M": Case("15M", 8, 24, 6),
    "SmolLM2-135M, 8 x 64": Case("SmolLM2-135M", 8, 10, 2, 64, beside_peak=True),
    "SmolLM2-135M, 4 x 256": Case("SmolLM2-135M", 4, 8, 2, 256, "alpaca", beside_peak=True),
    "tiny": Case(task.TINY, 2, 3, 1, beside_peak=True),
}
USUAL = ["stories260K", "15M"]
SAME_LOSS = 2e-3
"""Largest relative difference of the two sides' losses over all steps; more would mean that they do not do the same work."""


def measure(folder: Path, case: Case, *flags: str) -> dict[str, dict[str, Any]]:
    """All sides' figures: fresh processes, which take turns step by step."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    modules = SIDES | ({"peak": PEAK} if case.beside_peak else {})
    with tempfile.TemporaryFile("w+") as problems:
        sides = {
            side: subprocess.Popen(
                [sys.executable, "-m", module, str(folder), *case.arguments, *flags], cwd=Path(__file__).parent, env=os.environ | offline,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=problems, text=True,
            )
            for side, module in modules.items()
        }  # fmt: skip
        try:
            lines = {side: _read(process, problems) for side, process in sides.items()}
            for _ in range(case.steps + 1):
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


@dataclass(frozen=True, slots=True)
class Work:
    """What the steps that are counted come to."""

    tokens: int
    """Without padding."""
    flops: int
    """By formula, of padded rows: what is multiplied."""


def work_of(folder: Path, case: Case) -> Work:
    """By the batches, and the formula that a test compares with what is counted."""
    from atoll.base.read_shapes import read_shapes
    from atoll.cost.formulas import step_flops

    shapes, stored = read_shapes(str(folder / "model")), np.load(folder / "batches.npz")
    ranks, tokens, flops = {module.name: task.RANK for module in shapes.modules}, 0, 0
    for step in range(case.warmup_steps, case.steps):
        rows, width = stored[f"ids{step}"].shape
        num_labels = int((stored[f"labels{step}"] != -100).sum())
        tokens += int(stored[f"lengths{step}"].sum())
        flops += step_flops(shapes, ranks, num_rows=rows, row_tokens=width, num_label_tokens=num_labels).flops
    return Work(tokens, flops)


def compare(name: str, repeats: int) -> dict[str, Any]:
    """Both sides in turns on one case."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        task.prepare(
            case.model, folder, num_rows=2 * case.batch_size * case.steps, batch_size=case.batch_size, num_steps=case.steps,
            row_tokens=case.row_tokens, texts=case.texts,
        )  # fmt: skip
        work = work_of(folder, case)
        with_parts = measure(folder, case, "--parts")
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in with_parts}
        for repeat, sides in enumerate([measure(folder, case) for _ in range(repeats)] or [with_parts]):
            for side, run in sides.items():
                runs[side].append(run)
                if side in SIDES:
                    run |= {"tokens_per_second": work.tokens / run["seconds"], "flops_per_second": work.flops / run["seconds"]}
                    print(
                        f"{name} {repeat + 1} {side:8} {run['tokens_per_second']:8.0f} tokens/s,"
                        f" {run['flops_per_second'] / 1e9:6.1f} GFLOP/s, peak {run['peak_bytes'] / 1e6:5.0f} MB, of it"
                        f" {run['rise_bytes'] / 1e6:5.0f} MB while training, CPU {run['cpu_seconds']:.1f} s", flush=True,
                    )  # fmt: skip
                else:
                    run["flops_per_second"] = product.FLOPS * (case.steps - case.warmup_steps) / run["seconds"]
                    print(f"{name} {repeat + 1} {side:8} {run['flops_per_second'] / 1e9:6.1f} GFLOP/s", flush=True)
        parts = {side: with_parts[side]["parts_seconds"] for side in SIDES}
    return summary(runs, parts, case, work)


def summary(runs: dict[str, list[dict[str, Any]]], parts: dict[str, Any], case: Case, work: Work) -> dict[str, Any]:
    """Medians, ratios (Atoll to Trainer, and to the machine's best), whether the goals are met, where the time goes, and every repeat."""
    ours, theirs = (np.array(runs[side][0]["losses"]) for side in SIDES)
    difference = float(np.max(np.abs(ours - theirs) / theirs))
    assert difference < SAME_LOSS, f"the two sides do not train the same: losses differ by {difference}"
    keys = ("tokens_per_second", "cpu_seconds", "peak_bytes", "before_bytes", "rise_bytes")
    medians = {side: {key: statistics.median(run[key] for run in runs[side]) for key in keys} for side in SIDES}
    ratios = {key: medians["atoll"][key] / medians["trainer"][key] for key in keys}
    if "peak" in runs:  # Pair by pair: what the machine can do changes from minute to minute.
        for side, key in (("atoll", "flops_per_second"), ("trainer", "trainer_flops_per_second")):
            beside = zip(runs[side], runs["peak"], strict=True)
            ratios[key] = statistics.median(one["flops_per_second"] / best["flops_per_second"] for one, best in beside)
    met = {key: (ratios[key] <= goal) if key == "peak_bytes" else (ratios[key] >= goal) for key, goal in case.goals.items()}
    counted = case.steps - case.warmup_steps
    per_step = {side: {part: 1e3 * s / counted for part, s in spent.items()} for side, spent in parts.items()}
    repeats = {side: [{key: run[key] for key in (*keys, "seconds") if key in run} for run in some] for side, some in runs.items()}
    return {
        "ratios": ratios, "goals_met": met, "medians": medians, "counted_tokens": work.tokens, "counted_flops": work.flops,
        "largest_relative_loss_difference": difference, "milliseconds_per_step_by_part": per_step, "repeats": repeats,
    }  # fmt: skip


def main() -> None:
    """Measure, print and keep."""
    options = Options(__doc__)
    options.size("--repeats", 5, 0, help="without timers of parts; 0: the figures are those of the pair that has them")
    options.size("--only", USUAL, ["tiny"], choices=tuple(CASES))
    models = sorted({case.model for case in CASES.values()})
    options.add_argument("--model", choices=models, help="all cases of this one, instead of --only")
    given = options.parse()
    only = [name for name, case in CASES.items() if case.model == given.model] if given.model else given.only
    found = {name: compare(name, given.repeats) for name in only}
    for name, result in found.items():
        ratios, goals = result["ratios"], CASES[name].goals
        print(f"{name}: tokens/s x {ratios['tokens_per_second']:.2f} (goal {goals['tokens_per_second']}), peak memory x"
              f" {ratios['peak_bytes']:.2f} (goal {goals['peak_bytes']}), rise while training x {ratios['rise_bytes']:.2f},"
              f" CPU time x {ratios['cpu_seconds']:.2f}")  # fmt: skip
        if "flops_per_second" in ratios:
            print(f"  FLOP/s of the machine's best: Atoll {ratios['flops_per_second']:.2f} (goal {goals['flops_per_second']}), Trainer"
                  f" {ratios['trainer_flops_per_second']:.2f}")  # fmt: skip
        for side, parts in result["milliseconds_per_step_by_part"].items():
            print(f"  {side:8}" + ", ".join(f"{part} {ms:.1f} ms" for part, ms in parts.items()))
    config = {
        "cases": {name: asdict(CASES[name]) | {"goals": CASES[name].goals} for name in found}, "repeats": given.repeats, "threads": 2,
        "precision": "fp32", "lora": {"rank": task.RANK, "alpha": task.ALPHA, "targets": "all-linear"},
        "optimizer": "AdamW, cosine from 1e-3, no decay, clipping at 1", "random_15M": task.RANDOM_15M,
        "best": f"products of two fp32 matrices of {product.WIDTH} rows",
    }  # fmt: skip
    name = "local_step" if only == USUAL else f"local_step_{given.model or '_'.join(only)}"
    results.write(given.out, name, config, found)


if __name__ == "__main__":
    main()
