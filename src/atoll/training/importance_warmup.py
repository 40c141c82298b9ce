"""Warm-up: a few steps with adapters on every module, which are thrown away; what stays is how much each module's weight contributes.

P diag(l) Q is no layer of its own: before each step it is written into an ordinary pair as up = P diag(l), down = Q, and the pair's
gradients go on to P, l and Q by the chain rule. So it warms up wherever a pair trains: beside a quantized module, or one in a host.

Shape suffixes: O outputs and I inputs of a module, R rank of the warm-up, K rank of what is held still beside it, N rows of any matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from atoll.adapters.attach import Attached, attached
from atoll.adapters.fresh import fresh_adapters, head_state
from atoll.adapters.layers import LowRankPair
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.errors import AdapterFitError
from atoll.planner.importance import smoothed, triplet_scores_R
from atoll.seeding import stream
from atoll.threads import suited_threads
from atoll.training.local import checkpointing
from atoll.training.step import clip, fill_gradients, report_of
from atoll.training.trainer import Batches, StepReport

ORTHOGONALITY = 0.1
"""gamma: weight of |P^T P - I|_F + |Q Q^T - I|_F, summed over the modules, in what is minimised."""
START_DEVIATION = 0.02
"""Of the normal numbers that P and Q start with; l starts at zero. Source: AdaLoRA's own code."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """How one edge warms up."""

    kind: Literal["svd-sensitivity", "gradient-weight"]
    num_steps: int
    """With svd-sensitivity at least 2: in the first step l is zero, and every sensitivity with it."""
    rank: int
    alpha: float
    train: Train
    """For its learning rate, which stays at the peak, its clipping and weight decay."""
    seed: int
    edge: str
    round: int = 0
    """Rounds done before; another number draws other start values."""
    gradient_checkpointing: bool = False
    attempt: Callable[[Callable[[], float]], float] = lambda compute: compute()
    """Runs forward and backward of a step; a base in a host may be lost and found again within it."""


@dataclass(frozen=True, slots=True, eq=False)
class ModuleScores:
    """What a warm-up leaves."""

    scores: Mapping[str, float]
    """By module; not below zero, and not finite where training left the finite numbers."""
    reports: tuple[StepReport, ...]


def warm_up(
    base: Base, sizes: Mapping[str, tuple[int, int]], batches: Batches, settings: WarmUp, start: AdapterState | None = None
) -> ModuleScores:
    """Score the modules in `sizes` by training on the first batches, one a step, from the base with the adapters of `start`.

    Nothing else changes: neither `start`, nor the base, nor what the edge trains later. Equal arguments give equal scores.

    Shapes: sizes are (inputs, outputs) by module name.

    Raises: AdapterFitError where a module is missing or of another size, or `start` holds no lora adapters.
    """
    if start is not None and start.kind != "lora":
        raise AdapterFitError(
            "importance cannot be found beside these adapters", got=start.kind, expected="lora adapters", do='set plan.importance = "none"'
        )
    model = base.model
    forms, held = _new_forms(sizes, settings, model.device), _held(sizes, settings, start) + _head(base, start)
    numbers = [parameter for form in forms.values() for parameter in form.parameters]
    optimizer = torch.optim.AdamW(numbers, lr=settings.train.learning_rate, weight_decay=settings.train.weight_decay, fused=True)
    hidden_size = model.config.get_text_config().hidden_size
    with suited_threads(hidden_size), checkpointing(model, settings.gradient_checkpointing), attached(model, held) as adapters:
        reports = tuple(_step(base, adapters, forms, optimizer, batches, settings, step) for step in range(settings.num_steps))
    return ModuleScores({name: form.score() for name, form in forms.items()}, reports)


def _step(
    base: Base, adapters: Attached, forms: Mapping[str, _Form], optimizer: torch.optim.AdamW, batches: Batches, settings: WarmUp, step: int
) -> StepReport:
    batch = batches.batch(step).to(base.model.device)
    for name, form in forms.items():
        _write(adapters.layers[name], form, settings.rank)
    loss = settings.attempt(partial(fill_gradients, adapters, [batch], partial(base.objective.loss_sum, base.model)))
    for name, form in forms.items():
        _read(adapters.layers[name], form, settings.rank)
    grads = [parameter.grad for form in forms.values() for parameter in form.parameters if parameter.grad is not None]
    norm = clip(grads, settings.train.grad_clip)
    optimizer.step()
    return report_of(adapters, [batch], step, loss=loss, rate=settings.train.learning_rate, grad_norm=norm)


class _Form(Protocol):
    """What is trained beside a module, in its own parameters."""

    parameters: tuple[nn.Parameter, ...]

    def factors(self) -> tuple[Tensor, Tensor]:
        """As an ordinary pair, (up, down)."""

    def take(self, grad_up_OR: Tensor, grad_down_RI: Tensor) -> None:
        """Score the step by the loss's gradients of that pair, and set those of the own parameters."""

    def score(self) -> float:
        """Of the weight, from all steps."""


class _Svd:
    """P diag(l) Q with smoothed sensitivity and uncertainty of every entry."""

    def __init__(self, size: tuple[int, int], rank: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        left_OR = torch.randn(size[1], rank, generator=generator) * START_DEVIATION
        right_RI = torch.randn(rank, size[0], generator=generator) * START_DEVIATION
        self.left_OR, self.value_R, self.right_RI = (nn.Parameter(t.to(device)) for t in (left_OR, torch.zeros(rank), right_RI))
        self.parameters: tuple[nn.Parameter, ...] = (self.left_OR, self.value_R, self.right_RI)
        self._smoothed = [(torch.zeros_like(parameter.data), torch.zeros_like(parameter.data)) for parameter in self.parameters]

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.left_OR * self.value_R, self.right_RI

    @torch.no_grad()
    def take(self, grad_up_OR: Tensor, grad_down_RI: Tensor) -> None:
        grads = (grad_up_OR * self.value_R, (grad_up_OR * self.left_OR).sum(0), grad_down_RI)
        # Of the loss alone. AdaLoRA counts the penalty in, over thousands of steps; in a few, while l is small, its gradient, which is
        # the same whatever the data are, would drown theirs: all scores would be alike.
        self._smoothed = [
            smoothed(*before, (parameter.data * grad).abs())
            for before, parameter, grad in zip(self._smoothed, self.parameters, grads, strict=True)
        ]
        self.left_OR.grad = grads[0] + ORTHOGONALITY * orthogonality_gradient_NR(self.left_OR.data)
        self.value_R.grad = grads[1]
        self.right_RI.grad = grads[2] + ORTHOGONALITY * orthogonality_gradient_NR(self.right_RI.data.T).T

    def score(self) -> float:
        left_OR, value_R, right_RI = (importance * uncertainty for importance, uncertainty in self._smoothed)
        return float(triplet_scores_R(value_R, left_OR, right_RI).sum())


class _Plain:
    """B A, with the mean over the steps of the sum of |parameter x gradient|."""

    def __init__(self, adapter: ModuleAdapter, device: torch.device) -> None:
        self.up_OR, self.down_RI = (nn.Parameter(matrix.to(device)) for matrix in (adapter.up_OR, adapter.down_RI))
        self.parameters: tuple[nn.Parameter, ...] = (self.up_OR, self.down_RI)
        self._total, self._num_steps = torch.zeros((), dtype=torch.float64, device=device), 0

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up_OR.data, self.down_RI.data

    def take(self, grad_up_OR: Tensor, grad_down_RI: Tensor) -> None:
        for parameter, grad in zip(self.parameters, (grad_up_OR, grad_down_RI), strict=True):
            self._total += (parameter.data * grad).abs().sum(dtype=torch.float64)
            parameter.grad = grad.clone()
        self._num_steps += 1

    def score(self) -> float:
        return float(self._total) / max(1, self._num_steps)


def orthogonality_gradient_NR(matrix_NR: Tensor) -> Tensor:
    """The gradient of |M^T M - I|_F; zero where the columns are orthonormal, where it has none."""
    gap_RR = matrix_NR.T @ matrix_NR - torch.eye(matrix_NR.shape[1], device=matrix_NR.device)
    return 2 * matrix_NR @ (gap_RR / gap_RR.norm().clamp_min(torch.finfo(gap_RR.dtype).tiny))


def _new_forms(sizes: Mapping[str, tuple[int, int]], settings: WarmUp, device: torch.device) -> Mapping[str, _Form]:
    seed = stream(settings.seed, "warm-up", edge=settings.edge, round=settings.round)
    if settings.kind == "svd-sensitivity":
        # Every module has a stream of its own, so that its score does not depend on which others are adapted by more than training does.
        return {name: _Svd(size, settings.rank, stream(seed, f"adapter/{name}"), device) for name, size in sizes.items()}
    fresh = fresh_adapters("lora", sizes, dict.fromkeys(sizes, settings.rank), settings.alpha, seed)
    return {name: _Plain(adapter, device) for name, adapter in fresh.modules.items()}


def _held(sizes: Mapping[str, tuple[int, int]], settings: WarmUp, start: AdapterState | None) -> AdapterState:
    """Pairs with the adapters of `start` in their first K ranks, and room for the warm-up's own in the last R.

    One pair holds both, because a module in a host carries only one.
    """
    scaling, modules = settings.alpha / settings.rank, {}
    for name, (num_inputs, num_outputs) in sizes.items():
        down_RI, up_OR = torch.zeros(settings.rank, num_inputs), torch.zeros(num_outputs, settings.rank)
        still = start.modules.get(name) if start is not None else None
        if still is not None and bool(still.up_OR.any()):  # A fresh adapter changes nothing and needs no room.
            down_RI, up_OR = torch.cat([still.down_RI, down_RI]), torch.cat([still.up_OR * (still.scaling / scaling), up_OR], dim=1)
        modules[name] = ModuleAdapter(down_RI, up_OR, scaling)
    return AdapterState("lora", modules)


def _head(base: Base, start: AdapterState | None) -> AdapterState:
    """A classifier's head, as it stands; it is not scored, and held still."""
    return head_state(base.head) if start is None or not start.full_weights else AdapterState("lora", {}, start.full_weights)


def _write(pair: LowRankPair, form: _Form, rank: int) -> None:
    up_OR, down_RI = form.factors()
    pair.up_OR.data[:, -rank:].copy_(up_OR)
    pair.down_RI.data[-rank:].copy_(down_RI)


def _read(pair: LowRankPair, form: _Form, rank: int) -> None:
    assert pair.up_OR.grad is not None
    assert pair.down_RI.grad is not None
    form.take(pair.up_OR.grad[:, -rank:], pair.down_RI.grad[-rank:])
