"""Warm-up: a few steps with adapters on every module, which are thrown away; what stays is how much each module's weight contributes.

What is trained is no layer of its own: before each step it is written into an ordinary pair, and the pair's gradients go on to its own
parameters. So it warms up wherever a pair trains: beside a quantized module, or one in a host.

Shape suffixes: O outputs and I inputs of a module, R rank of the warm-up, K rank of what is held still beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from atoll.adapters.attach import Attached, attached
from atoll.adapters.fresh import head_state
from atoll.adapters.layers import LowRankPair
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.errors import AdapterFitError
from atoll.registry.parts import make, wrong_result
from atoll.seeding import stream
from atoll.threads import suited_threads
from atoll.training.importance_score import ImportanceScore, WarmUpModule
from atoll.training.local_trainer import checkpointing
from atoll.training.step import clip, fill_gradients, report_of
from atoll.training.trainer import Batches, StepReport


@dataclass(frozen=True, slots=True)
class WarmUp:
    """How one edge warms up."""

    kind: str
    """The name of an importance score."""
    num_steps: int
    rank: int
    alpha: float
    train: Train
    """For its learning rate, which stays at the peak, its clipping and weight decay."""
    seed: int
    edge: str
    round: int = 0
    """Rounds done before; another number draws other start values."""
    gradient_checkpointing: bool = False
    options: Mapping[str, object] | None = None
    """The score's own."""
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
    forms, held = _new_scores(sizes, settings, model.device), _held(sizes, settings, start) + _head(base, start)
    numbers = [parameter for form in forms.values() for parameter in form.parameters]
    optimizer = torch.optim.AdamW(numbers, lr=settings.train.learning_rate, weight_decay=settings.train.weight_decay, fused=True)
    hidden_size = model.config.get_text_config().hidden_size
    with suited_threads(hidden_size), checkpointing(model, settings.gradient_checkpointing), attached(model, held) as adapters:
        reports = tuple(_step(base, adapters, forms, optimizer, batches, settings, step) for step in range(settings.num_steps))
    return ModuleScores({name: _score(form, settings.kind) for name, form in forms.items()}, reports)


def _score(form: ImportanceScore, kind: str) -> float:
    score = form.score()
    # Where training left the finite numbers, so does the score: that is told of the edge, and is no mistake of the part.
    if isinstance(score, bool) or not isinstance(score, int | float) or score < 0:
        raise wrong_result("importance", kind, "score", score, "a number, not below zero")
    return float(score)


def _step(
    base: Base, adapters: Attached, forms: Mapping[str, ImportanceScore], optimizer: torch.optim.AdamW, batches: Batches,
    settings: WarmUp, step: int,
) -> StepReport:
    batch = batches.batch(step).to(base.model.device)
    for name, form in forms.items():
        _write(adapters.layers[name], form, settings)
    loss = settings.attempt(partial(fill_gradients, adapters, [batch], partial(base.objective.loss_sum, base.model)))
    for name, form in forms.items():
        _read(adapters.layers[name], form, settings.rank)
    grads = [parameter.grad for form in forms.values() for parameter in form.parameters if parameter.grad is not None]
    norm = clip(grads, settings.train.grad_clip)
    optimizer.step()
    return report_of(adapters, [batch], step, loss=loss, rate=settings.train.learning_rate, grad_norm=norm)


def _new_scores(sizes: Mapping[str, tuple[int, int]], settings: WarmUp, device: torch.device) -> Mapping[str, ImportanceScore]:
    seed = stream(settings.seed, "warm-up", edge=settings.edge, round=settings.round)
    modules = [WarmUpModule(name, size, settings.rank, settings.alpha, seed, device) for name, size in sizes.items()]
    return {module.name: make("importance", settings.kind, settings.options, module) for module in modules}


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


def _write(pair: LowRankPair, form: ImportanceScore, settings: WarmUp) -> None:
    room = pair.up_OR.data[:, -settings.rank :], pair.down_RI.data[-settings.rank :]
    factors = form.factors()
    is_pair = isinstance(factors, tuple | list) and len(factors) == 2 and all(isinstance(one, torch.Tensor) for one in factors)
    if not is_pair or [one.shape for one in factors] != [one.shape for one in room]:
        got = [tuple(one.shape) for one in factors] if is_pair else factors
        expected = f"up_OR and down_RI of shapes {tuple(room[0].shape)} and {tuple(room[1].shape)}"
        raise wrong_result("importance", settings.kind, "factors", got, expected)
    for own, factor in zip(room, factors, strict=True):
        own.copy_(factor)


def _read(pair: LowRankPair, form: ImportanceScore, rank: int) -> None:
    assert pair.up_OR.grad is not None
    assert pair.down_RI.grad is not None
    form.take(pair.up_OR.grad[:, -rank:], pair.down_RI.grad[-rank:])
