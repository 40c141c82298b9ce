"""The seam between training and where the frozen base runs: a Trainer is given an adapter, batches and a plan, and returns an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from atoll.adapters.state import AdapterState
from atoll.tasks.batches import Batch


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerState:
    """Adam's moments, flat in the order of the adapter's modules (down, up, down, up, ...), fp32."""

    first_moment: Tensor
    second_moment: Tensor
    num_steps: int


@dataclass(frozen=True, slots=True, eq=False)
class TrainState:
    """Where an edge's training stands: all that the next round goes on from."""

    adapter: AdapterState
    optimizer: OptimizerState | None
    """None: start with empty moments."""
    step: int
    """Optimizer steps of this edge so far; decides batches and learning rate."""


@dataclass(frozen=True, slots=True)
class FitPlan:
    """How much to train in one call, and how."""

    num_steps: int
    accumulate: int
    """Micro-batches per optimizer step."""
    gradient_checkpointing: bool


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step."""

    step: int
    loss: float
    """Mean over the step's label tokens, nats."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    num_label_tokens: int
    micro_batches: tuple[tuple[int, int], ...]
    """(rows, padded tokens a row) of each forward pass, for counting work."""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What a Trainer returns."""

    state: TrainState
    reports: tuple[StepReport, ...]

    @property
    def mean_loss(self) -> float:
        """Mean over all label tokens of all steps, nats."""
        tokens = sum(report.num_label_tokens for report in self.reports)
        return sum(report.loss * report.num_label_tokens for report in self.reports) / max(1, tokens)


class Batches(Protocol):
    """Micro-batches by number: the same number is always the same batch."""

    def batch(self, step: int) -> Batch:
        """The micro-batch with this number."""


class Trainer(Protocol):
    """One place for the frozen base to run."""

    def fit(self, state: TrainState, batches: Batches, plan: FitPlan, on_step: Callable[[StepReport], None]) -> Update:
        """Train `plan.num_steps` steps from `state`; `state` itself is not changed."""
