"""What a device of a host does in benchmarks: its batch, its adapters, and one training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState
from atoll.adapters.targets import resolve_targets
from atoll.base.head import loss_sum
from atoll.base.load import Base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Adapter, Cut, Data, Model, RunConfig, Train, Wire
from atoll.tasks.batches import Batch, pad_batch
from atoll.tasks.tokens import Example
from atoll.training.step import new_stepper
from sides.host import RANK, ROWS, TOKENS

SLOW_BITS, SLOW_SECONDS = 100e6, 0.05


def batch(vocab_size: int, rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    """Full rows, the later half of which carries loss."""
    random = np.random.default_rng(0)
    loss = np.arange(tokens) >= tokens // 2
    return pad_batch([Example(random.integers(3, vocab_size, tokens, dtype=np.int32), loss) for _ in range(rows)], 0)


def adapters(folder: Path, active: str) -> AdapterState:
    """Adapters on query, key and value of all blocks, or on every eighth of these modules."""
    shapes = read_shapes(str(folder))
    names = resolve_targets(["q_proj", "k_proj", "v_proj"], shapes.modules)
    names = names if active == "all" else names[7::8]
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules if module.name in names}
    return fresh_adapters("lora", sizes, dict.fromkeys(sizes, RANK), 16, 0)


@contextmanager
def stepping(base: Base, state: AdapterState, rows: int = ROWS, tokens: int = TOKENS) -> Iterator[Any]:
    """A function that makes one training step and returns its seconds."""
    with attached(base.model, state) as on:
        stepper, number = new_stepper(on, Train(), 10_000, {}), iter(range(10_000))
        one = batch(base.model.config.vocab_size, rows, tokens)

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
