"""Where the blocks are divided, and which positions of a batch cross: both sides agree on these.

Shape suffixes: B rows, T positions, N real tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """How many blocks the device keeps at either end."""

    front: int
    back: int


def real_positions(lengths: Sequence[int], positions: int, device: torch.device) -> Tensor | None:
    """Flat positions of the real tokens of right-padded rows; None where there is no padding."""
    if all(length == positions for length in lengths):
        return None
    return torch.cat([torch.arange(row * positions, row * positions + length) for row, length in enumerate(lengths)]).to(device)


def moved_to_end(at_N: Tensor, lengths: Sequence[int], positions: int) -> Tensor:
    """Flat positions of real tokens of right-padded rows, where they are once every row is moved to the end of its place."""
    padding_B = positions - torch.tensor(lengths, device=at_N.device)
    return at_N + padding_B[at_N // positions]


def gather(x_BTD: Tensor, at_N: Tensor | None) -> Tensor:
    """The rows of flat positions; all where `at_N` is None.

    Shapes: (..., D) to (N, D).
    """
    flat = x_BTD.reshape(-1, x_BTD.shape[-1])
    return flat if at_N is None else flat[at_N]


def spread(x_ND: Tensor, at_N: Tensor | None, rows: int, positions: int) -> Tensor:
    """The inverse of `gather`, with zeros elsewhere.

    Shapes: (N, D) to (rows, positions, D).
    """
    if at_N is None:
        return x_ND.reshape(rows, positions, -1)
    out = x_ND.new_zeros(rows * positions, x_ND.shape[-1])
    return out.index_copy_(0, at_N, x_ND).view(rows, positions, -1)


def plus_at(x_BTD: Tensor, at_N: Tensor | None, y_ND: Tensor) -> Tensor:
    """The sum with y at the flat positions of x, which stays as it was: quantized modules give views that must not be changed."""
    if at_N is None:
        return x_BTD + y_ND.view(x_BTD.shape)
    out = x_BTD.clone()
    add_at(out, at_N, y_ND)
    return out


def add_at(out: Tensor, at_N: Tensor | None, x_ND: Tensor) -> None:
    """Add x at the flat positions of `out`, in place."""
    flat = out.view(-1, out.shape[-1])
    if at_N is None:
        flat += x_ND
    else:
        flat.index_add_(0, at_N, x_ND)
