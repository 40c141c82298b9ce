"""Atoll's local step in a process of its own: python -m sides.ours TASK_FOLDER BATCH_SIZE STEPS WARMUP [--parts]"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from atoll.adapters.peft_files import load_adapter
from atoll.base import head
from atoll.base.load import load_base
from atoll.config.schema import Train
from atoll.tasks.batches import BatchStream
from atoll.tasks.tokens import pad_id
from atoll.training import local_trainer, step
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, StepReport, TrainState
from sides.meter import Meter, Parts
from sides.task import EDGE, LEARNING_RATE, SEED, read_examples


def _time_parts() -> Parts:
    parts = Parts()
    parts.time(BatchStream, "batch", "batch making")
    parts.time(head, "hidden_states", "forward of base and adapters")
    parts.time(local_trainer, "loss_sum", "head and loss, with their gradient")
    parts.time(torch.Tensor, "backward", "backward of base and adapters")
    parts.time(step.Stepper, "_clip", "gradient norm and clipping")
    parts.time(torch.optim.AdamW, "step", "optimizer")
    return parts


def main(folder: Path, batch_size: int, num_steps: int, warmup_steps: int, with_parts: bool) -> None:
    """Train and print the figures."""
    torch.set_num_threads(2)
    base = load_base(str(folder / "model"))
    examples, start = read_examples(folder / "examples.npz"), load_adapter(folder / "adapter")
    batches = BatchStream(examples, batch_size, SEED, EDGE, "bucket", pad_id(base.tokenizer))
    trainer = LocalTrainer(base, Train(learning_rate=LEARNING_RATE), num_steps, dropout=0.0, seed=SEED, edge=EDGE)
    meter = Meter(warmup_steps, _time_parts() if with_parts else None)

    def on_step(report: StepReport) -> None:
        meter.step_done(report.loss)

    meter.start()
    trainer.fit(TrainState(start, {}, 0), batches, FitPlan(num_steps, 1, False), on_step)
    meter.print_result()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), "--parts" in sys.argv)
