"""A training step through a host on loopback against its bound: the same step with the whole base here, plus its bytes at bare gRPC's rate.

The host is a process of its own (`atoll host`). Every repeat takes turns: local step, split step, a transfer of the same bytes in frames
of the same size over a bare gRPC stream. Ratios of medians are what counts.

Usage: python benchmarks/split_step.py [--repeats 5] [--models 15M,100M] [--link]
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState
from atoll.adapters.targets import resolve_targets
from atoll.base.head import loss_sum
from atoll.base.load import Base, load_base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Adapter, Cut, Data, Model, RunConfig, Train, Wire
from atoll.cost.split_traffic import groups, step_bytes
from atoll.jobs.split import HostAccess, SplitSide, join
from atoll.tasks.batches import Batch, pad_batch
from atoll.tasks.tokens import Example
from atoll.training.step import new_stepper
from sides import results, task
from sides.line import Line

SIZES = {
    "15M": task.RANDOM_15M,
    "100M": task.RANDOM_15M | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12},
}
ROWS, TOKENS, RANK = 4, 128, 8
SLOW_BITS, SLOW_SECONDS = 100e6, 0.05
GOALS = {"loopback": 1.10, "slow link": 1.25, "bytes": 1.02}


def batch() -> Batch:
    """Full rows, the later half of which carries loss."""
    random = np.random.default_rng(0)
    loss = np.arange(TOKENS) >= TOKENS // 2
    return pad_batch([Example(random.integers(3, 32000, TOKENS, dtype=np.int32), loss) for _ in range(ROWS)], 0)


def adapters(folder: Path, active: str) -> AdapterState:
    """Adapters on query, key and value of all blocks, or on every eighth of these modules."""
    shapes = read_shapes(str(folder))
    names = resolve_targets(["q_proj", "k_proj", "v_proj"], shapes.modules)
    names = names if active == "all" else names[7::8]
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules if module.name in names}
    return fresh_adapters("lora", sizes, dict.fromkeys(sizes, RANK), 16, 0)


@contextmanager
def host(folder: Path) -> Iterator[str]:
    """A host of its own process, once it listens: its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "atoll", "host", "--model", str(folder), "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        words = process.stdout.readline().split()
        yield words[words.index("on") + 1]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def stepping(base: Base, state: AdapterState) -> Iterator[Any]:
    """A function that makes one training step and returns its seconds."""
    with attached(base.model, state) as on:
        stepper, one, number = new_stepper(on, Train(), 10_000, {}), batch(), iter(range(10_000))

        def step() -> float:
            start = time.perf_counter()
            stepper.step([one], lambda each: loss_sum(base.model, each), next(number))
            return time.perf_counter() - start

        yield step


def config(mode: str, link: bool) -> RunConfig:
    """What the device is told."""
    slow: dict[str, Any] = {"link_bandwidth": SLOW_BITS, "link_latency": SLOW_SECONDS} if link else {}
    return RunConfig(
        model=Model(cut=Cut(front=0, back=0)), data=Data(max_length=TOKENS), adapter=Adapter(rank=RANK), wire=Wire(mode=mode, **slow)  # type: ignore[arg-type]
    )


def measure(folder: Path, base: Base, address: str, mode: str, active: str, repeats: int, link: bool) -> dict[str, float]:
    """One row of the table."""
    settings, state = config(mode, link), adapters(folder, active)
    side: SplitSide = join(str(folder), settings, HostAccess(address), ROWS * TOKENS)
    shapes, ranks = read_shapes(str(folder)), state.ranks
    formula = step_bytes(settings, shapes, ranks, num_tokens=ROWS * TOKENS, num_label_tokens=batch().num_label_tokens)
    with stepping(side.base, state) as split_step, stepping(base, state) as local_step, Line() as line:
        local_step()
        split_step()
        before = side.client.account.copy()
        times = [(local_step(), split_step(), line.seconds(formula.up_bytes, formula.down_bytes)) for _ in range(repeats)]
        moved = side.client.account.since(before)
    side.close()
    local, split, line_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    written = (moved.sent.total() + moved.received.total()) / repeats
    round_trips = 2 * len(groups(settings, shapes, ranks)) + 1
    # Question and answer take turns, so that the two directions of the link are never busy at once.
    slow = 8 * formula.shared_bytes / SLOW_BITS + 2 * SLOW_SECONDS * round_trips if link else line_seconds
    return {
        "local_seconds": local, "split_seconds": split, "line_seconds": line_seconds, "bound_seconds": local + slow,
        "ratio": statistics.median(there / (here + (slow if link else bare)) for here, there, bare in times), "bytes": written,
        "bytes_to_formula": written / formula.shared_bytes, "round_trips": round_trips,
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", default="15M,100M")
    parser.add_argument("--link", action="store_true", help="over a link of 100 Mbit/s and 50 ms")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for name in given.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            task.random_llama(Path(folder), SIZES[name])
            base = load_base(folder)
            with host(Path(folder)) as address:
                for mode in ("dense", "factored"):
                    for active in ("all", "1/8"):
                        row = measure(Path(folder), base, address, mode, active, given.repeats, given.link)
                        found[f"{name} {mode} {active}"] = row
                        print(f"{name:5} {mode:9} {active:4}", " ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    settings = {"rows": ROWS, "tokens": TOKENS, "rank": RANK, "repeats": given.repeats, "threads": torch.get_num_threads(), "goals": GOALS}
    kept = "split_slow_link" if given.link else "split_step"
    results.write(f"{kept}_{given.models.replace(',', '_')}", settings, found)


if __name__ == "__main__":
    main()
