"""AdaLoRA's importance: smoothed sensitivity and uncertainty of the entries of P diag(l) Q, summed over triplets.

Source: AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512), eqs. 7 to 11, for the entries and triplets; a module's score is the sum over
its triplets.

Shape suffixes: O outputs and I inputs of a module, R rank of its warm-up adapter P diag(l) Q, N rows of any matrix.
"""

from __future__ import annotations

from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from atoll.seeding import stream
from atoll.training.importance_score import WarmUpModule

ORTHOGONALITY = 0.1
"""gamma: weight of |P^T P - I|_F + |Q Q^T - I|_F, summed over the modules, in what is minimised."""
START_DEVIATION = 0.02
"""Of the normal numbers that P and Q start with; l starts at zero. Source: AdaLoRA's own code."""
KEEP_IMPORTANCE = 0.85
"""b1: the share of the smoothed sensitivity that a step leaves as it was."""
KEEP_UNCERTAINTY = 0.85
"""b2: the same share of the uncertainty."""


class Arithmetic(Protocol):
    """What a sensitivity may be: a number, or a tensor of them."""

    def __add__(self, other: Any, /) -> Self:
        """Sum."""

    def __sub__(self, other: Any, /) -> Self:
        """Difference."""

    def __mul__(self, other: Any, /) -> Self:
        """Product."""

    def __abs__(self) -> Self:
        """Magnitude."""


A = TypeVar("A", bound=Arithmetic)


def smoothed(importance: A, uncertainty: A, sensitivity: A) -> tuple[A, A]:
    """I' and U' after a step in which the entry's sensitivity |w dL/dw| was s; both start at zero, and I' U' is the entry's score.

    I' = b1 I + (1 - b1) s, and U' = b2 U + (1 - b2) |s - I'|. Three steps with sensitivities 2, 2 and 0, by hand:
    I = 0.3, 0.555, 0.47175 and U = 0.255, 0.4335, 0.4392375.

    >>> state = (0.0, 0.0)
    >>> for s in (2.0, 2.0, 0.0):
    ...     state = smoothed(*state, s)
    ...     print(f"{state[0]:.5f} {state[1]:.7f} {state[0] * state[1]:.7f}")
    0.30000 0.2550000 0.0765000
    0.55500 0.4335000 0.2405925
    0.47175 0.4392375 0.2072103
    """
    importance = importance * KEEP_IMPORTANCE + sensitivity * (1 - KEEP_IMPORTANCE)
    uncertainty = uncertainty * KEEP_UNCERTAINTY + abs(sensitivity - importance) * (1 - KEEP_UNCERTAINTY)
    return importance, uncertainty


def triplet_scores_R(value_R: Any, left_OR: Any, right_RI: Any) -> Any:
    """S(l_i) + mean over j of S(P_ji) + mean over j of S(Q_ij) for every triplet i, from the scores of all entries (numpy or torch).

    >>> import numpy as np
    >>> left, right = np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[6.0, 0.0, 3.0], [0.0, 0.0, 9.0]])
    >>> triplet_scores_R(np.array([10.0, 20.0]), left, right).tolist()
    [15.0, 25.0]
    """
    return value_R + left_OR.mean(0) + right_RI.mean(1)


class SvdSensitivity:
    """[plan] importance = "svd-sensitivity": P diag(l) Q with smoothed sensitivity and uncertainty of every entry."""

    least_steps = 2
    """In the first step l is zero, and every sensitivity with it."""

    def __init__(self, module: WarmUpModule) -> None:
        generator = torch.Generator().manual_seed(stream(module.seed, f"adapter/{module.name}"))
        left_OR = torch.randn(module.size[1], module.rank, generator=generator) * START_DEVIATION
        right_RI = torch.randn(module.rank, module.size[0], generator=generator) * START_DEVIATION
        start = (left_OR, torch.zeros(module.rank), right_RI)
        self.left_OR, self.value_R, self.right_RI = (nn.Parameter(tensor.to(module.device)) for tensor in start)
        self.parameters: tuple[nn.Parameter, ...] = (self.left_OR, self.value_R, self.right_RI)
        self._smoothed = [(torch.zeros_like(parameter.data), torch.zeros_like(parameter.data)) for parameter in self.parameters]

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """As an ordinary pair: up = P diag(l), down = Q."""
        return self.left_OR * self.value_R, self.right_RI

    @torch.no_grad()
    def take(self, grad_up_OR: Tensor, grad_down_RI: Tensor) -> None:
        """By the chain rule, with the gradient of the penalty beside."""
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
        """The sum over its triplets."""
        left_OR, value_R, right_RI = (importance * uncertainty for importance, uncertainty in self._smoothed)
        return float(triplet_scores_R(value_R, left_OR, right_RI).sum())


def orthogonality_gradient_NR(matrix_NR: Tensor) -> Tensor:
    """The gradient of |M^T M - I|_F; zero where the columns are orthonormal, where it has none."""
    gap_RR = matrix_NR.T @ matrix_NR - torch.eye(matrix_NR.shape[1], device=matrix_NR.device)
    return 2 * matrix_NR @ (gap_RR / gap_RR.norm().clamp_min(torch.finfo(gap_RR.dtype).tiny))
