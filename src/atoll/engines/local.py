"""Train adapters on a base in this process, or on one whose middle blocks a host runs: the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from atoll.adapters.attach import attached
from atoll.base.head import loss_sum
from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.engines.step import Stepper, new_stepper
from atoll.engines.trainer import Batches, FitPlan, StepReport, TrainState, Update
from atoll.seeding import stream
from atoll.tasks.batches import Batch
from atoll.threads import suited_threads


@dataclass(frozen=True, slots=True)
class LocalTrainer:
    """Trains adapters on a base in memory; the base may be shared by any number of edges, one after the other."""

    base: Base
    train: Train
    total_steps: int
    """Steps of the whole run, for the schedule."""
    dropout: float
    seed: int
    edge: str
    attempt: Callable[[Callable[[], StepReport]], StepReport] = lambda step: step()
    """Runs a step; a base in a host may be lost and found again within it."""

    def fit(self, state: TrainState, batches: Batches, plan: FitPlan, on_step: Callable[[StepReport], None]) -> Update:
        """Train `plan.num_steps` steps from `state`; `state` itself is not changed."""
        model, reports = self.base.model, []
        with (
            suited_threads(model.config.get_text_config().hidden_size),
            attached(model, state.adapter, dropout=self.dropout) as adapters,
            _checkpointing(model, plan.gradient_checkpointing),
        ):
            stepper = new_stepper(adapters.flat, self.train, self.total_steps, state.optimizer)
            adapters.train(True)
            for step in range(state.step, state.step + plan.num_steps):
                parts = [batches.batch(step * plan.accumulate + part).to(model.device) for part in range(plan.accumulate)]
                report = self.attempt(partial(self._step, stepper, parts, step))
                reports.append(report)
                on_step(report)
            end = TrainState(adapters.state(), stepper.optimizer_state(), state.step + plan.num_steps)
        return Update(end, tuple(reports))

    def _step(self, stepper: Stepper, parts: Sequence[Batch], step: int) -> StepReport:
        """One step, the same however often it is begun: adapters and moments change at its end."""
        if self.dropout:
            torch.manual_seed(stream(self.seed, "dropout", edge=self.edge, round=step))
        return stepper.step(parts, lambda batch: loss_sum(self.base.model, batch), step)


@contextmanager
def _checkpointing(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Recompute block activations in the backward pass.

    Not by the library's own switch, which works in training mode only and would wake the base's dropout.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if on else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the instance's wrapper: the class's own method shows again
