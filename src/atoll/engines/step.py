"""One optimisation step, used by every trainer: learning rate, accumulation, clipping, AdamW over one flat tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atoll.config.schema import Train
from atoll.engines.trainer import OptimizerState, StepReport
from atoll.tasks.batches import Batch


def learning_rate_at(train: Train, step: int, total_steps: int) -> float:
    """The learning rate of step number `step` (from 0): linear warm-up, then the schedule over the rest."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / (train.warmup_steps + 1)
    done = (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[train.schedule]
    return train.learning_rate * max(0.0, shape)


@dataclass(frozen=True, slots=True, eq=False)
class Stepper:
    """AdamW on one flat parameter, whose gradient the adapters' matrices write into."""

    flat: nn.Parameter
    optimizer: torch.optim.AdamW
    train: Train
    total_steps: int

    def step(self, batches: Sequence[Batch], loss_sum: Callable[[Batch], Tensor], step: int) -> StepReport:
        """Accumulate the batches' gradients, clip, and move the parameter once.

        The loss is the mean over all label tokens of all batches, so that accumulation equals one large batch.
        """
        assert self.flat.grad is not None
        self.flat.grad.zero_()
        num_label_tokens = sum(len(batch.target_N) for batch in batches)
        loss = 0.0
        for batch in batches:
            part = loss_sum(batch) / num_label_tokens
            part.backward()
            loss += part.item()
        grad_norm = self._clip()
        rate = learning_rate_at(self.train, step, self.total_steps)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        rows, width = zip(*(batch.input_ids_BT.shape for batch in batches), strict=True)
        num_tokens = sum(batch.num_tokens for batch in batches)
        return StepReport(step, loss, rate, grad_norm, num_tokens, num_label_tokens, tuple(zip(rows, width, strict=True)))

    def _clip(self) -> float:
        assert self.flat.grad is not None
        norm = self.flat.grad.norm().item()
        if self.train.grad_clip and norm > self.train.grad_clip:
            self.flat.grad.mul_(self.train.grad_clip / (norm + 1e-6))
        return norm

    def optimizer_state(self) -> OptimizerState:
        """Adam's moments as they are now, copied."""
        state = self.optimizer.state[self.flat]
        return OptimizerState(state["exp_avg"].cpu().clone(), state["exp_avg_sq"].cpu().clone(), int(state["step"].item()))


def new_stepper(flat: nn.Parameter, train: Train, total_steps: int, start: OptimizerState | None) -> Stepper:
    """A stepper that goes on from `start`, or with empty moments."""
    optimizer = torch.optim.AdamW([flat], lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
    if start is not None:
        # `step` is a tensor of its own on the parameter's device: that is what the fused kernel reads.
        optimizer.state[flat] = {
            "step": torch.tensor(float(start.num_steps), device=flat.device),
            "exp_avg": start.first_moment.to(flat.device, copy=True),
            "exp_avg_sq": start.second_moment.to(flat.device, copy=True),
        }
    return Stepper(flat, optimizer, train, total_steps)
