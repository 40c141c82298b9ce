"""How far the adapter of a module has moved: what Kill-and-Revive ranks modules by.

Source of the monitored quantity: DLoRA (arXiv 2404.05182), Fig. 3, "l2-norm variation of each module"; its exact form is not known, and
the three here are our readings of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from atoll.adapters.state import ModuleAdapter


def change(before: ModuleAdapter, after: ModuleAdapter) -> float:
    """Norm of the change of both matrices together, per root of the number of parameters, so that modules of unequal shape compare."""
    return _rms(_flat(after) - _flat(before))


def norm_change(before: ModuleAdapter, after: ModuleAdapter) -> float:
    """Difference of the norms of both matrices together, per root of the number of parameters."""
    return abs(_rms(_flat(after)) - _rms(_flat(before)))


def product_change(before: ModuleAdapter, after: ModuleAdapter) -> float:
    """Frobenius norm of the change of scaling * B A, per root of the number of its entries (lora only)."""
    # |X Y|^2 = trace of (X^T X)(Y Y^T): the products themselves, as large as the base's weights, are never formed.
    x = torch.cat([after.scaling * after.up_OR.double(), -before.scaling * before.up_OR.double()], dim=1)
    y = torch.cat([after.down_RI.double(), before.down_RI.double()])
    square = ((x.T @ x) * (y @ y.T)).sum().item()
    return math.sqrt(max(0.0, square) / (x.shape[0] * y.shape[1]))


def magnitude(before: ModuleAdapter, after: ModuleAdapter) -> float:
    """Root mean square of the parameters as they are; where they were does not matter."""
    return _rms(_flat(after))


MOVEMENTS: Final[Mapping[str, Callable[[ModuleAdapter, ModuleAdapter], float]]] = {
    "change": change, "norm-change": norm_change, "product-change": product_change, "magnitude": magnitude,
}  # fmt: skip


def _flat(adapter: ModuleAdapter) -> Tensor:
    return torch.cat([adapter.down_RI.flatten(), adapter.up_OR.flatten()]).double()


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
