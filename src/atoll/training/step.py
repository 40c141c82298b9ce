"""One optimisation step, used by every trainer: learning rate, accumulation, clipping, AdamW over one flat tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.adapters.attach import Attached
from atoll.config.schema import Train
from atoll.tasks.batches import Batch
from atoll.training.trainer import Moments, OptimizerState, StepReport


def learning_rate_at(train: Train, step: int, total_steps: int) -> float:
    """The learning rate of step number `step` (from 0): linear warm-up, then the schedule over the rest."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / (train.warmup_steps + 1)
    done = (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[train.schedule]
    return train.learning_rate * max(0.0, shape)


def fill_gradients(adapters: Attached, batches: Sequence[Batch], loss_sum: Callable[[Batch], Tensor]) -> float:
    """Write the gradients of the mean loss over all label tokens of the batches; that loss, in nats."""
    for flat in adapters.flats:
        flat.grad.zero_()
    num_label_tokens = sum(len(batch.target_N) for batch in batches)
    loss = 0.0
    for number, batch in enumerate(batches):
        if adapters.remote_blocks is not None:
            adapters.remote_blocks.ends_step = number == len(batches) - 1
        part = loss_sum(batch) / num_label_tokens
        part.backward()
        loss += part.item()
    return loss


def clip(grads: Sequence[Tensor], largest: float) -> float:
    """Scale the gradients down together where their norm is above the largest (0: never); the norm before."""
    norm = math.hypot(*(grad.norm().item() for grad in grads))
    if largest and norm > largest:
        for grad in grads:
            grad.mul_(largest / (norm + 1e-6))
    return norm


def report_of(adapters: Attached, batches: Sequence[Batch], step: int, *, loss: float, rate: float, grad_norm: float) -> StepReport:
    """What is told of a step."""
    rows, width = zip(*(batch.input_ids_BT.shape for batch in batches), strict=True)
    num_tokens, num_label_tokens = sum(batch.num_tokens for batch in batches), sum(len(batch.target_N) for batch in batches)
    shapes = tuple(zip(rows, width, strict=True))
    return StepReport(step, loss, rate, grad_norm, num_tokens, num_label_tokens, shapes, adapters.trained)


@dataclass(frozen=True, slots=True, eq=False)
class Stepper:
    """AdamW on the flat tensors whose gradients the adapters' matrices write into."""

    adapters: Attached
    optimizer: torch.optim.AdamW
    train: Train
    total_steps: int

    def step(self, batches: Sequence[Batch], loss_sum: Callable[[Batch], Tensor], step: int) -> StepReport:
        """Accumulate the batches' gradients, clip, and move the adapters once.

        The loss is the mean over all label tokens of all batches, so that accumulation equals one large batch.
        """
        loss = fill_gradients(self.adapters, batches, loss_sum)
        grad_norm = clip([flat.grad for flat in self.adapters.flats], self.train.grad_clip)
        rate = learning_rate_at(self.train, step, self.total_steps)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return report_of(self.adapters, batches, step, loss=loss, rate=rate, grad_norm=grad_norm)

    def optimizer_state(self) -> dict[str, Moments]:
        """The moments of the trained modules, in the stepper's own memory: it makes no step after this."""
        found: dict[str, Moments] = {}
        for flat in self.adapters.flats:
            state = self.optimizer.state[flat.numbers]
            first, second = state["exp_avg"].cpu(), state["exp_avg_sq"].cpu()
            for name, part in flat.parts.items():
                found[name] = Moments(first[part], second[part], int(state["step"].item()))
        return found


def cohorts_of(names: Sequence[str], start: OptimizerState) -> list[list[str]]:
    """The modules by how many steps their moments have seen: Adam corrects its bias by one count for a whole tensor."""
    cohorts: dict[int, list[str]] = {}
    for name in names:
        cohorts.setdefault(start[name].num_steps if name in start else 0, []).append(name)
    return list(cohorts.values())


def new_stepper(adapters: Attached, train: Train, total_steps: int, start: OptimizerState) -> Stepper:
    """A stepper that goes on from `start`; `adapters` were attached in the cohorts of it."""
    numbers = [flat.numbers for flat in adapters.flats]
    optimizer = torch.optim.AdamW(numbers, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
    for flat in adapters.flats:
        known = [start[name] for name in flat.parts if name in start]
        if known:
            device = flat.numbers.device
            # `step` is a tensor of its own on the parameter's device: that is what the fused kernel reads.
            optimizer.state[flat.numbers] = {
                "step": torch.tensor(float(known[0].num_steps), device=device),
                "exp_avg": torch.cat([moments.first for moments in known]).to(device),
                "exp_avg_sq": torch.cat([moments.second for moments in known]).to(device),
            }
    return Stepper(adapters, optimizer, train, total_steps)
