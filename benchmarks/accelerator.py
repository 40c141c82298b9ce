"""What to measure where an accelerator is at hand: nobody has run Atoll on one yet. Without one it is left out; --quick runs it on the CPU.

Each part is by itself, in the order in which it is wanted if time is short, and is written as soon as it is through; ten minutes are
enough on a large GPU. Nothing is downloaded: the base of real size is random, and made where it is to be.

facts   what the machine can do: products of square matrices in each precision
same    whole runs on it beside the same runs on the CPU, in every way in which the pretended accelerator of the tests tries them;
        and whether two equal runs give equal bits
step    the training step of a base of 8 billion weights: time, memory beside the plan's, and what likely changes are worth
split   a host and a device on it, in both wire modes
where   the kernels that a step's time goes to

Usage: python benchmarks/accelerator.py [--parts facts same step split where] [--tokens 1024]
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}  # before torch

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import atoll
from atoll.adapters.fresh import fresh_adapters
from atoll.base import head
from atoll.base.load import Base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Train
from atoll.planner.feasibility import Setting
from atoll.tasks.batches import Batch
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, StepReport, TrainState
from sides import big_bases, needs, results
from sides.options import BENCHMARKS, Options

RANK = 16
ON = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON else "cpu")
PARTS = ("facts", "same", "step", "split", "where")


def facts(width: int) -> dict[str, Any]:
    """The machine, and the FLOP/s that a step in each precision is held against."""
    found: dict[str, Any] = {}
    if ON:
        own = torch.cuda.get_device_properties(0)
        found |= {"accelerator": own.name, "memory_bytes": own.total_memory, "multiprocessors": own.multi_processor_count}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"), ("fp32", torch.float32, "highest"), ("tf32", torch.float32, "high"),
    ):  # fmt: skip
        with matmul_precision(precision):
            a_MM = torch.randn(width, width, device=DEVICE, dtype=dtype)
            found[f"{name}_flops_per_second"] = 2 * width**3 / _seconds(lambda a_MM=a_MM: a_MM @ a_MM)  # type: ignore[misc]
    return found


def same(folder: Path, cases: list[str]) -> dict[str, Any]:
    """Losses on the CPU and here, by case; and whether bits come again."""
    command = [sys.executable, "-m", "tests.accelerator.runs", "--real", str(folder), *cases]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, stdout=subprocess.PIPE, text=True, check=True)
    found = {line.pop("case"): line for line in map(json.loads, done.stdout.splitlines())}
    toml = folder / "equal.toml"
    toml.write_text('[data]\nprompt = "{mr} ->"\ncompletion = " {ref}"\n[run]\nrounds = 1\n[train]\nlocal_steps = 4\n')
    bits = [(atoll.train(toml, out=folder / f"equal-{n}").adapter / "adapter_model.safetensors").read_bytes() for n in range(2)]
    return {"cases": found, "two runs give equal bits": bits[0] == bits[1]}


class Steps:
    """Training steps on a random base, made where it is to be."""

    def __init__(self, folder: Path, name: str, rows: int, tokens: int, dtype: torch.dtype) -> None:
        self.rows, self.tokens, self.dtype = rows, tokens, dtype
        _forget()
        (folder / name).mkdir(exist_ok=True)
        config = big_bases.write(name, folder / name)
        self.shapes = read_shapes(str(folder / name))
        with torch.device(DEVICE):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)

    def run(self, *, again: bool = False, steps: int = 6, rows: int | None = None, tokens: int | None = None) -> dict[str, Any]:
        """Median seconds of a step, and the largest memory beside the plan's."""
        rows, tokens = rows or self.rows, tokens or self.tokens
        sizes = {module.name: (module.d_in, module.d_out) for module in self.shapes.modules}
        ids_BT = torch.randint(0, self.shapes.vocab_size, (rows, tokens), device=DEVICE)
        at_N = torch.cat([torch.arange(tokens - 1, device=DEVICE) + row * tokens for row in range(rows)])
        only = Batch(ids_BT, at_N, ids_BT.flatten()[at_N + 1], None, None, (tokens,) * rows)

        class Same:
            def batch(self, step: int) -> Batch:
                return only

        moments: list[float] = []

        def told(report: StepReport) -> None:
            _wait()
            moments.append(time.perf_counter())

        _forget()
        base = Base("random", self.model, None, False)  # type: ignore[arg-type]
        trainer = LocalTrainer(base, Train(schedule="constant"), 99, 0.0, 0, "edge")
        # From step 1 on: the first one of an edge counts its FLOPs.
        start = TrainState(fresh_adapters("lora", sizes, dict.fromkeys(sizes, RANK), 2.0 * RANK, 0), {}, 1)
        trainer.fit(start, Same(), FitPlan(steps, 1, again), told)
        seconds, bits = statistics.median(late - early for early, late in pairwise(moments[1:])), 8 * self.dtype.itemsize
        plan = Setting(self.shapes, dict.fromkeys(sizes, RANK), bits, rows, tokens, again, process_bytes=0, holds_all=False)
        return {"seconds": seconds, "tokens_per_second": rows * tokens / seconds, "planned_bytes": plan.peak_bytes, **_memory()}

    def peft(self) -> dict[str, Any]:
        """The same adapters by PEFT's own layers, the library's loss and autocast, without a Trainer around it."""
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(self.model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3, fused=ON)
        ids_BT = torch.randint(0, self.shapes.vocab_size, (self.rows, self.tokens), device=DEVICE)

        def one() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        _forget()
        try:
            seconds = _seconds(one, 4)
            return {"seconds": seconds, "tokens_per_second": self.rows * self.tokens / seconds, **_memory()}
        finally:
            model.unload()
            self.model.requires_grad_(False)


def step(folder: Path, name: str, rows: int, tokens: int, keep: Callable[[str, Any], None]) -> None:
    """Case by case, each kept as it comes: the last ones may not fit."""
    steps = Steps(folder, name, rows, tokens, torch.bfloat16)
    keep("bf16", steps.run())
    keep("bf16, PEFT", steps.peft())
    keep("bf16, one row of a quarter of the tokens", steps.run(rows=1, tokens=max(8, tokens // 4)))
    keep("bf16, checkpointing", steps.run(again=True))
    usual = head.CHUNK_BYTES
    for size in (2**28, 2**30):
        head.CHUNK_BYTES = size
        keep(f"bf16, logits in blocks of {size >> 20} MiB", steps.run())
    head.CHUNK_BYTES = usual
    del steps
    steps = Steps(folder, name, rows, tokens, torch.float32)
    keep("fp32 (the default), checkpointing", steps.run(again=True, steps=4))
    with matmul_precision("high"):
        keep("tf32, checkpointing", steps.run(again=True, steps=4))


def split(folder: Path, wires: list[str]) -> dict[str, Any]:
    """Seconds of whole runs of eight steps with a host in the same process."""
    toml, found = folder / "split.toml", {}
    toml.write_text('[data]\nprompt = "{mr} ->"\ncompletion = " {ref}"\n[run]\nrounds = 1\nplacement = "split"\n[train]\nlocal_steps = 8\n')
    for wire in wires:
        mode, codec = wire.split()
        start, overrides = time.monotonic(), [f"wire.mode={mode}", f"wire.codec={codec}", "model.precision=bf16"]
        run = atoll.train(toml, out=folder / f"split-{mode}-{codec}", overrides=overrides)
        found[wire] = {"seconds": time.monotonic() - start, "loss": (run.summary.eval.adapted or {}).get("loss")}
    return found


def where(folder: Path, name: str, rows: int, tokens: int) -> list[dict[str, Any]]:
    """The kernels that took longest, in seconds of three steps."""
    from torch.profiler import ProfilerActivity, profile

    steps = Steps(folder, name, rows, tokens, torch.bfloat16)
    steps.run(steps=3)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON else [])]) as seen:
        steps.run(steps=3)
    spent = [
        {"what": one.key[:120], "calls": one.count, "seconds": (one.self_device_time_total if ON else one.self_cpu_time_total) / 1e6}
        for one in seen.key_averages()
    ]  # fmt: skip
    return sorted(spent, key=lambda one: -float(one["seconds"]))[:30]


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Products of fp32 numbers inside are made so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _seconds(action: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(2):
        action()
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    _wait()
    return (time.perf_counter() - start) / repeats


def _wait() -> None:
    if ON:
        torch.cuda.synchronize()


def _memory() -> dict[str, int]:
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()} if ON else {}


def _forget() -> None:
    gc.collect()
    if ON:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Part by part."""
    options = Options(__doc__)
    options.size("--parts", list(PARTS), list(PARTS), choices=PARTS)
    options.size("--base", "llama3-8b", "small", choices=tuple(big_bases.BASES))
    options.size("--rows", 8, 2)
    options.size("--tokens", 1024, 32)
    options.size("--width", 8192, 64, help="of the matrices whose product is timed")
    options.size("--wires", ["dense bf16", "dense int8", "factored bf16", "factored int8"], ["factored int8"], help="modes and codecs")
    options.size("--cases", [], ["local"], help="of the runs that are compared with the CPU's; by itself all")
    given = options.parse()
    if not (ON or given.quick):
        needs.leave("an accelerator that torch finds (torch.cuda.is_available)")
    found: dict[str, Any] = {}
    config = {name: getattr(given, name) for name in ("base", "rows", "tokens", "width")} | {"rank": RANK, "device": DEVICE.type}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def keep(part: str, what: Any) -> None:
            found[part] = what
            print(f"{part}: {json.dumps(what)}", flush=True)
            results.write(given.out, "accelerator", config, found)

        by_name: dict[str, Callable[[], None]] = {
            "facts": lambda: keep("facts", facts(given.width)),
            "same": lambda: keep("same", same(folder, given.cases)),
            "step": lambda: step(folder, given.base, given.rows, given.tokens, keep),
            "split": lambda: keep("split", split(folder, given.wires)),
            "where": lambda: keep("where", where(folder, given.base, given.rows, given.tokens)),
        }
        for part in given.parts:
            try:
                by_name[part]()
            except (RuntimeError, atoll.errors.AtollError, subprocess.CalledProcessError) as problem:
                keep(f"{part}: failed", f"{type(problem).__name__}: {problem}"[:500])
            _forget()


if __name__ == "__main__":
    main()
