"""How fast this machine trains: real LoRA steps on a base, timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from atoll import seeding
from atoll.adapters.fresh import fresh_adapters
from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.cost.formulas import step_flops
from atoll.shapes import BaseShapes
from atoll.tasks.batches import Batch, pad_batch
from atoll.tasks.tokens import Example
from atoll.threads import suited_threads
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, StepReport, TrainState

ROWS, ROW_TOKENS, RANK, ALPHA = 8, 128, 8, 16.0
WARM_UP_STEPS = 3
"""The first counts its FLOPs, which takes time; the second is the first plain one; the third tells how many there is time for."""
MEASURED_SECONDS = 10.0
FEWEST_STEPS, MOST_STEPS = 3, 25


@dataclass(frozen=True, slots=True)
class Speed:
    """Training steps, all alike: adapters of rank `rank` on every projection, `num_rows` rows of `row_tokens` tokens without padding."""

    step_flops: int
    """By cost.formulas."""
    step_seconds: tuple[float, ...]
    num_rows: int
    row_tokens: int
    num_label_tokens: int
    rank: int
    num_modules: int
    device: str
    threads: int

    @property
    def flops_per_second(self) -> float:
        """By the median step."""
        return self.step_flops / max(statistics.median(self.step_seconds), 1e-9)


@dataclass(frozen=True, slots=True)
class _Same:
    """One micro-batch, whatever the step."""

    one: Batch

    def batch(self, step: int) -> Batch:
        return self.one


def measure_speed(base: Base, shapes: BaseShapes, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Train the base for some ten seconds, at least a few steps, on random tokens of which the later half of each row carries loss."""
    row_tokens = min(ROW_TOKENS, shapes.max_positions or ROW_TOKENS)
    batch = _random_batch(shapes.vocab_size, row_tokens)
    ranks = {module.name: RANK for module in shapes.modules}
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    trainer = LocalTrainer(base, Train(schedule="constant"), WARM_UP_STEPS + MOST_STEPS + 1, 0.0, 0, "profile")

    def fit(state: TrainState, num_steps: int) -> tuple[TrainState, list[float]]:
        moments: list[float] = []

        def told(report: StepReport) -> None:
            moments.append(clock())

        after = trainer.fit(state, _Same(batch), FitPlan(num_steps, 1, False), told).state
        return after, [late - early for early, late in pairwise(moments)]

    state, warm = fit(TrainState(fresh_adapters("lora", sizes, ranks, ALPHA, 0), {}, 0), WARM_UP_STEPS)
    num_steps = min(MOST_STEPS, max(FEWEST_STEPS, math.ceil(MEASURED_SECONDS / max(warm[-1], 1e-9))))
    # One more: what putting the adapters on the model takes lies before its end.
    _, seconds = fit(state, num_steps + 1)
    flops = step_flops(shapes, ranks, num_rows=ROWS, row_tokens=row_tokens, num_label_tokens=batch.num_label_tokens).flops
    with suited_threads(shapes.d_model):
        threads = torch.get_num_threads()
    return Speed(flops, tuple(seconds), ROWS, row_tokens, batch.num_label_tokens, RANK, len(ranks), base.model.device.type, threads)


def _random_batch(vocab_size: int, row_tokens: int) -> Batch:
    random = np.random.default_rng(seeding.stream(0, "profile"))
    has_loss = np.arange(row_tokens) >= row_tokens // 2
    rows: Sequence[Example] = [Example(random.integers(0, vocab_size, row_tokens, dtype=np.int32), has_loss) for _ in range(ROWS)]
    return pad_batch(rows, 0)
