"""The singular value decomposition of a product of two matrices, without forming the product: all of it, or its largest part.

Shape suffixes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, svds
from torch import Tensor

from atoll.threads import num_threads

_SMALL = 256
"""Up to so many singular values all of them are found."""
_FEW = 8
"""Above, the leading ones are found by themselves where there are so many times more."""


@dataclass(frozen=True, slots=True, eq=False)
class SingularFactors:
    """up_OR diag(values_R) down_RI, with orthonormal columns of `up` and rows of `down`, values falling; fp64."""

    up_OR: Tensor
    values_R: Tensor
    down_RI: Tensor


# Two threads on thin factors cost the threaded QR far more than they save, up to 50 times: hence one.
@num_threads(1)
def singular_factors(up_OR: Tensor, down_RI: Tensor) -> SingularFactors:
    """The thin SVD of up_OR @ down_RI, by QR of each factor and the SVD of the small core.

    Shapes: R of the result is at most min(rank, inputs, outputs).
    """
    q_up, r_up = torch.linalg.qr(up_OR.double())
    q_down, r_down = torch.linalg.qr(down_RI.double().T)
    u, values, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return SingularFactors(q_up @ u, values, vh @ q_down.T)


@dataclass(frozen=True, slots=True, eq=False)
class LeadingFactors:
    """The largest singular values of a product, and squared Frobenius norms of what is missing and of the product."""

    factors: SingularFactors
    missed: float
    whole: float


@num_threads(1)
def leading_factors(up_OR: Tensor, down_RI: Tensor | None, rank: int) -> LeadingFactors:
    """The best approximation of up_OR @ down_RI, or of a dense up_OI, at `rank`, to the rounding of fp64.

    Of many singular values the leading ones alone are found, by Lanczos iterations (ARPACK), which take time as the product's size times
    `rank`, and not as its cube.
    """
    up, down = up_OR.double(), None if down_RI is None else down_RI.double()
    num_values = min(*up.shape, *(() if down is None else down.shape))
    found = _by_lanczos(up, down, rank) if num_values > max(_SMALL, _FEW * rank) else None
    if found is not None:
        whole = float(up.square().sum() if down is None else ((up.T @ up) * (down @ down.T)).sum())
        return LeadingFactors(found, max(0.0, whole - float(found.values_R.square().sum())), whole)
    every = SingularFactors(*torch.linalg.svd(up, full_matrices=False)) if down is None else singular_factors(up, down)
    squares_R = every.values_R.square()
    return LeadingFactors(every, float(squares_R[rank:].sum()), float(squares_R.sum()))


def _by_lanczos(up: Tensor, down: Tensor | None, rank: int) -> SingularFactors | None:
    """None where the iterations come to no end."""

    def times(*factors: Tensor) -> Callable[[np.ndarray], np.ndarray]:
        def product(x: np.ndarray) -> np.ndarray:
            result = torch.from_numpy(np.ascontiguousarray(x))
            for factor in reversed(factors):
                result = factor @ result
            return result.numpy()

        return product

    forth, back = (times(up), times(up.T)) if down is None else (times(up, down), times(down.T, up.T))
    size = up.shape[0], (up if down is None else down).shape[1]
    operator = LinearOperator(size, matvec=forth, rmatvec=back, matmat=forth, rmatmat=back, dtype=np.float64)
    # Drawn from a seed of its own: two runs are alike, and no product is made so that the start lies across it.
    start = np.random.default_rng(0).standard_normal(min(size))
    try:
        columns, values, rows = svds(operator, k=rank, v0=start, solver="arpack", tol=0)
    except ArpackError:
        return None
    largest_first = np.argsort(-values, kind="stable")
    parts = columns[:, largest_first], values[largest_first], rows[largest_first]
    return SingularFactors(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


@num_threads(1)
def aligned(factors: SingularFactors, reference_RI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (up_OR, down_RI) of the best rank-`rank` approximation whose `down` lies as near to `reference_RI` as a rotation brings it.

    The product does not depend on the reference. The rotation (orthogonal Procrustes) and the reference's row length keep an
    optimizer's moments meaningful where a new product replaces an old one.

    Shapes: reference (any rank, inputs); missing singular values are padded with zeros in `up`.
    """
    down, values, up = factors.down_RI[:rank], factors.values_R[:rank], factors.up_OR[:, :rank]
    reference = reference_RI.double()
    row_length = reference.norm() / reference.shape[0] ** 0.5
    overlap_RR = torch.zeros(down.shape[0], down.shape[0], dtype=torch.float64)
    head = reference[: down.shape[0]]
    overlap_RR[: head.shape[0]] = head @ down.T
    x, _, yh = torch.linalg.svd(overlap_RR)
    rotation_RR = x @ yh
    return (up * values) @ rotation_RR.T / row_length, row_length * (rotation_RR @ down)
