"""The base in this process: the simplest trainer, and the oracle for every other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from atoll.engines.step import new_stepper
from atoll.engines.trainer import Batches, FitPlan, StepReport, TrainState, Update
from atoll.seeding import stream
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
                if self.dropout:
                    torch.manual_seed(stream(self.seed, "dropout", edge=self.edge, round=step))
                parts = [batches.batch(step * plan.accumulate + part).to(model.device) for part in range(plan.accumulate)]
                report = stepper.step(parts, lambda batch: loss_sum(model, batch), step)
                reports.append(report)
                on_step(report)
            end = TrainState(adapters.state(), stepper.optimizer_state(), state.step + plan.num_steps)
        return Update(end, tuple(reports))


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
