"""The seam of the importance warm-up: what is trained beside a module for some steps, and how important that says the module is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class WarmUpModule:
    """One module to score."""

    name: str
    size: tuple[int, int]
    """(inputs, outputs)."""
    rank: int
    """Of what is trained beside it."""
    alpha: float
    seed: int
    """Of the warm-up: what a module draws must depend on its own name, and not on which others are scored."""
    device: torch.device


class ImportanceScore(Protocol):
    """What is trained beside one module, made anew for every warm-up with that module (and, where it has any, its options).

    Its class may say `least_steps` (a warm-up of fewer tells nothing) and `per_parameter` (scores are divided by the module's size).

    Shapes: O outputs and I inputs of the module, R rank.
    """

    parameters: tuple[nn.Parameter, ...]

    def factors(self) -> tuple[Tensor, Tensor]:
        """As an ordinary pair, (up_OR, down_RI), which is put beside the module for the next step."""

    def take(self, grad_up_OR: Tensor, grad_down_RI: Tensor) -> None:
        """Score the step by the loss's gradients of that pair, and set those of the own parameters."""

    def score(self) -> float:
        """Of the module, from all steps; not below zero."""
