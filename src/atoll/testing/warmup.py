"""Checks of importance scores: a pair that fits its module, gradients for what is trained, a score that can be compared."""

from __future__ import annotations

import math

import torch

from atoll.testing.law import Subject
from atoll.training.importance_score import WarmUpModule

_MODULES = ({"size": (6, 5), "rank": 2}, {"size": (3, 9), "rank": 3})


def check_importance(subject: Subject) -> None:
    """Raises: BrokenLaw."""
    least = subject.trait("least_steps")
    subject.expect(isinstance(least, int) and least >= 1, f"least_steps is 1 or more, not {least!r}")
    for one in _MODULES:
        module = WarmUpModule("blocks.0.m", one["size"], one["rank"], 8.0, 5, torch.device("cpu"))  # type: ignore[arg-type]
        first, again = (_scored(subject, module, least + 2) for _ in range(2))
        subject.expect(first == again, f"the same gradients give the same score, not {first} and {again}")
        subject.expect(math.isfinite(first) and first >= 0, f"a score is finite and not below zero, not {first}")


def _scored(subject: Subject, module: WarmUpModule, steps: int) -> float:
    (num_inputs, num_outputs), rank = module.size, module.rank
    form, generator = subject.make(module), torch.Generator().manual_seed(11)
    subject.expect(len(form.parameters) > 0, "something is trained: parameters")
    optimizer = torch.optim.AdamW(form.parameters, lr=1e-2)
    for _ in range(steps):
        factors = form.factors()
        is_pair = isinstance(factors, tuple | list) and len(factors) == 2 and all(isinstance(one, torch.Tensor) for one in factors)
        subject.expect(is_pair, f"factors are two tensors, not {factors!r:.60}")
        up_OR, down_RI = factors
        shapes = tuple(up_OR.shape), tuple(down_RI.shape)
        expected = (num_outputs, rank), (rank, num_inputs)
        subject.expect(shapes == expected, f"factors are (outputs, rank) and (rank, inputs): {expected}, not {shapes}")
        form.take(torch.randn(num_outputs, rank, generator=generator), torch.randn(rank, num_inputs, generator=generator))
        subject.expect(all(one.grad is not None for one in form.parameters), "take sets the gradients of all parameters")
        optimizer.step()
    score = form.score()
    subject.expect(isinstance(score, int | float), f"a score is a number, not {score!r:.60}")
    return float(score)
