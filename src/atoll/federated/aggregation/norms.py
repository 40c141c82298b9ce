"""How large an adapter is: norms of its product and of its factors, and the largest from which training can go on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.low_rank import squared_norm
from atoll.adapters.state import AdapterState, Kind, ModuleAdapter

LARGEST_NORM = 1e3
"""Of what a module adds to its weight. A gated feed-forward layer multiplies what two modules make and puts it through a third; the norm
that follows, and its gradient, square and cube that: of n^3 h^2, h the norm of what modules read, fp32 must hold the cube. Measured: with
everything in one direction, training is finite at 1e3 and is not at 1e4; the example runs come to 4 to 14 (docs/security.md)."""


def product_norm(part: ModuleAdapter | FullWeightDelta, kind: Kind) -> float:
    """Frobenius norm of s B A, or of the change of a weight and its bias; of a bottleneck, which has no product, the product of norms."""
    if not isinstance(part, ModuleAdapter):
        return math.hypot(*map(_norm, part.tensors))
    if kind == "bottleneck":
        return abs(part.scaling) * _norm(part.down_RI) * _norm(part.up_OR)
    return math.sqrt(squared_norm(part.up_OR.double() * part.scaling, part.down_RI.double()))


def factor_norm(part: ModuleAdapter | FullWeightDelta) -> float:
    """The larger of the norms of A and B, with or without the scaling: rules average them apart, and gradients of one hold the other."""
    if not isinstance(part, ModuleAdapter):
        return math.hypot(*map(_norm, part.tensors))
    return max(_norm(part.down_RI), _norm(part.up_OR) * max(1.0, abs(part.scaling)))


def largest_norm(state: AdapterState) -> float:
    """Of all products and factors of a state whose numbers are finite."""
    norms = (max(product_norm(part, state.kind), factor_norm(part)) for part in state.parts.values())
    return max(norms, default=0.0)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
