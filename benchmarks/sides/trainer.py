"""Hugging Face Trainer with PEFT LoRA in a process of its own: python -m sides.trainer TASK_FOLDER BATCH_SIZE STEPS WARMUP [--parts]

The Trainer's own loop, loader, optimizer and schedule; logging, reports, checkpoints and progress bars are off. Imports nothing of Atoll.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sides.meter import Meter, Parts

LEARNING_RATE = 1e-3


class Rows(Dataset):
    """The rows of all batches in their order, without padding."""

    def __init__(self, path: Path) -> None:
        stored = np.load(path)
        self.items: list[tuple[np.ndarray, np.ndarray]] = []
        for step in range(len(stored.files) // 3):
            batch = zip(stored[f"ids{step}"], stored[f"labels{step}"], stored[f"lengths{step}"], strict=True)
            self.items += [(ids[:length].copy(), labels[:length].copy()) for ids, labels, length in batch]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.items[index]


def collate(rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row, as Atoll does, with an attention mask and labels of -100."""
    shape = len(rows), max(len(ids) for ids, _ in rows)
    input_ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100)
    for row, (ids, row_labels) in enumerate(rows):
        input_ids[row, : len(ids)], mask[row, : len(ids)], labels[row, : len(ids)] = ids, 1, row_labels
    arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class InOrder(Trainer):
    """Rows come in the order they are stored, and the loss of every step is kept."""

    meter: Meter

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The library's, with its result kept."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.meter.losses.append(float(loss))
        return loss


class StepEnds(TrainerCallback):
    """Tells the meter when a step is done."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the Trainer after the optimizer and the schedule."""
        self.meter.step_done(self.meter.losses.pop())


def main(folder: Path, batch_size: int, num_steps: int, warmup_steps: int, with_parts: bool) -> None:
    """Train and print the figures."""
    torch.set_num_threads(2)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=num_steps, per_device_train_batch_size=batch_size, learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=1.0, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_strategy="no", save_strategy="no", eval_strategy="no", dataloader_num_workers=0, dataloader_pin_memory=False,
        gradient_checkpointing=False, remove_unused_columns=False, logging_nan_inf_filter=False,
    )  # fmt: skip
    parts = Parts() if with_parts else None
    meter = Meter(warmup_steps, parts)
    trainer = InOrder(model=model, args=arguments, train_dataset=Rows(folder / "batches.npz"), data_collator=collate)
    trainer.meter = meter
    trainer.add_callback(StepEnds(meter))
    if parts is not None:
        parts.time(model, "forward", "forward, with head and loss")
        parts.time(torch.Tensor, "backward", "backward, with head and loss")
        parts.time(torch.optim.AdamW, "step", "optimizer")
        parts.time(trainer, "get_batch_samples", "batch making")
        parts.time(trainer.accelerator, "clip_grad_norm_", "gradient norm and clipping")
    meter.start()
    trainer.train()
    meter.print_result()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), "--parts" in sys.argv)
