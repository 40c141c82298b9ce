"""Train adapters on a base in this process, or on one whose middle blocks a host runs: the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from atoll.adapters.attach import attached
from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.cost.meters import CountedFlops, CountedStep
from atoll.remote_blocks import find_placeholder
from atoll.seeding import stream
from atoll.selection.selector import ModuleSelector
from atoll.tasks.batches import Batch
from atoll.threads import suited_threads
from atoll.training.module_statistics import ModuleMonitor, Segment
from atoll.training.step import Stepper, cohorts_of, new_stepper
from atoll.training.trainer import Batches, FitPlan, OptimizerState, StepReport, TrainState, Update


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """What stays the same over the segments of a fit."""

    batches: Batches
    plan: FitPlan
    tracker: ModuleMonitor
    on_step: Callable[[StepReport], None]


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
    selector: ModuleSelector | None = None
    """Which modules are active when; None: all of them, all the time."""

    def fit(self, state: TrainState, batches: Batches, plan: FitPlan, on_step: Callable[[StepReport], None]) -> Update:
        """Train `plan.num_steps` steps from `state`; `state` itself is not changed."""
        model, end = self.base.model, state.step + plan.num_steps
        tracker, now = ModuleMonitor(self.selector, state.statistics, state.adapter), state
        reports: list[StepReport] = []

        def told(report: StepReport) -> None:
            reports.append(report)
            on_step(report)

        with suited_threads(model.config.get_text_config().hidden_size), checkpointing(model, plan.gradient_checkpointing):
            while now.step < end:
                segment = tracker.segment(now.step)
                until = end if segment.end is None else min(end, segment.end)
                now = self._segment(now, segment, until, _Fit(batches, plan, tracker, told))
                tracker.end(now.step, now.adapter)
        return Update(replace(now, statistics=tracker.statistics(now.adapter)), tuple(reports))

    def _segment(self, state: TrainState, segment: Segment, until: int, fit: _Fit) -> TrainState:
        """Train up to step number `until` with the same modules active."""
        model, killed = self.base.model, segment.killed
        optimizer = self._moments(state.optimizer, segment)
        trained = [name for name in state.adapter.parts if name not in killed.names]
        cohorts = cohorts_of(trained, optimizer)
        frozen_delta_ranks = {} if state.frozen_delta is None else state.frozen_delta.ranks
        with attached(
            model, state.adapter, dropout=self.dropout, killed=killed, cohorts=cohorts, frozen_delta=state.frozen_delta
        ) as adapters:
            stepper = new_stepper(adapters, self.train, self.total_steps, optimizer)
            adapters.train(True)
            for step in range(state.step, until):
                parts = [fit.batches.batch(number).to(model.device) for number in fit.plan.micro_batches(step)]
                report = replace(self.attempt(partial(self._step, stepper, parts, step)), frozen_delta=frozen_delta_ranks)
                if step == state.step:
                    offloaded = () if killed.how == "skip" else tuple(killed.names)
                    report = replace(report, active_change=segment.active_change, offloaded=offloaded)
                fit.tracker.see(adapters, report)
                fit.on_step(report)
            optimizer = {**optimizer, **stepper.optimizer_state()}
            return TrainState(adapters.state(), optimizer, until, frozen_delta=state.frozen_delta)

    def _moments(self, optimizer: OptimizerState, segment: Segment) -> OptimizerState:
        assert self.selector is not None or not segment.killed.names
        if self.selector is None or self.selector.select.killed_moments == "keep":
            return optimizer
        return {name: moments for name, moments in optimizer.items() if name not in segment.killed.names}

    def _step(self, stepper: Stepper, parts: Sequence[Batch], step: int) -> StepReport:
        """One step, the same however often it is begun: adapters and moments change at its end."""
        if self.dropout:
            torch.manual_seed(stream(self.seed, "dropout", edge=self.edge, round=step))
        forward = partial(self.base.objective.loss_sum, self.base.model)
        if step > 0:
            return stepper.step(parts, forward, step)
        with CountedFlops(self.base.objective.frozen_head(self.base.model)) as count:
            report = stepper.step(parts, forward, step)
        return replace(report, counted=CountedStep(count.flops - count.head_flops, count.head_flops))


@contextmanager
def checkpointing(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Recompute block activations in the backward pass.

    Not by the library's own switch, which works in training mode only and would wake the base's dropout.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if on else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    remote_blocks = find_placeholder(model)
    if remote_blocks is not None:
        remote_blocks.checkpoint = on
    try:
        yield
    finally:
        if remote_blocks is not None:
            remote_blocks.checkpoint = False
        for block in blocks:
            del block.forward  # the instance's wrapper: the class's own method shows again
