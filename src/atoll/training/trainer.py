"""The seam between training and where the frozen base runs: a Trainer is given an adapter, batches and a plan, and returns an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from atoll.adapters.state import AdapterState
from atoll.cost.meters import CountedStep
from atoll.tasks.batches import Batch


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Adam's moments of one module, flat (down, up), fp32. They count steps of their own: a killed module has fewer."""

    first: Tensor
    second: Tensor
    num_steps: int


OptimizerState = Mapping[str, Moments]
"""By module; a module that is absent starts with empty moments."""


@dataclass(frozen=True, slots=True, eq=False)
class ModuleStatistics:
    """What an edge's choice of modules goes on from: the last choice, and what the open window has seen so far."""

    chosen: tuple[str, ...] | None = None
    """Active modules between windows; None: nothing was chosen yet."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """By module, what the last choice was made by."""
    moved: AdapterState | None = None
    """What the adapters have moved in the open window by this edge's steps: the difference of their matrices."""
    sums: Mapping[str, float] = field(default_factory=dict)
    """By module, what is measured at every step (norm of the gradient, saliency), added up over those of the open window."""
    num_steps: int = 0
    """Steps of the open window; the two below are summed over them."""
    num_tokens: int = 0
    num_label_tokens: int = 0

    def fits(self, adapter: AdapterState) -> bool:
        """Whether it is of these modules, in these ranks; a new plan may change both."""
        seen = {*(self.chosen or ()), *self.scores, *self.sums}
        moved = {} if self.moved is None else self.moved.modules
        same = all(name in adapter.modules and adapter.modules[name].down_RI.shape == one.down_RI.shape for name, one in moved.items())
        return same and seen <= set(adapter.modules)


@dataclass(frozen=True, slots=True, eq=False)
class TrainState:
    """Where an edge's training stands: all that the next round goes on from."""

    adapter: AdapterState
    optimizer: OptimizerState
    step: int
    """Optimizer steps of this edge so far; decides batches and learning rate."""
    statistics: ModuleStatistics = ModuleStatistics()
    frozen_delta: AdapterState | None = None
    """Frozen, evaluated under what is trained: part of the base as far as training is concerned."""


@dataclass(frozen=True, slots=True)
class ActiveSetChange:
    """The active set is another from a step on."""

    reason: Literal["window", "choice"]
    killed: tuple[str, ...]
    revived: tuple[str, ...]
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class FitPlan:
    """How much to train in one call, and how."""

    num_steps: int
    accumulate: int
    """Micro-batches per optimizer step."""
    gradient_checkpointing: bool
    epoch_batches: int | None = None
    """Micro-batches of an epoch, where it ends with a step, as the last one's rest may be smaller (as transformers has it); None: steps
    go on over its end."""

    def micro_batches(self, step: int) -> range:
        """Numbers of the micro-batches of one step, counted over all epochs."""
        if self.epoch_batches is None:
            return range(step * self.accumulate, (step + 1) * self.accumulate)
        epoch, place = divmod(step, -(-self.epoch_batches // self.accumulate))
        first, end = epoch * self.epoch_batches, (epoch + 1) * self.epoch_batches
        return range(first + place * self.accumulate, min(first + (place + 1) * self.accumulate, end))


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
    active: tuple[str, ...]
    """Modules that were trained."""
    frozen_delta: Mapping[str, int] = field(default_factory=dict)
    """Ranks of what was evaluated as the frozen delta."""
    offloaded: tuple[str, ...] = ()
    """Killed modules that were given to whoever runs their blocks right before this step."""
    active_change: ActiveSetChange | None = None
    """What changed right before this step."""
    counted: CountedStep | None = None
    """What this step really computed here; counted at an edge's first step only, because counting takes time."""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What a Trainer returns."""

    state: TrainState
    reports: tuple[StepReport, ...]

    @property
    def trained(self) -> frozenset[str]:
        """Modules that were active in any of the steps."""
        return frozenset(name for active in {report.active for report in self.reports} for name in active)

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
