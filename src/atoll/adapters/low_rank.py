"""The singular value decomposition of a product of two matrices, without forming the product: all of it, or its largest part.

Shape suffixes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
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


def squared_norm(up_OR: Tensor, down_RI: Tensor) -> float:
    """Of the product, in the Frobenius norm."""
    return max(0.0, float(((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum()))


@num_threads(1)
def leading_factors(up_OR: Tensor, down_RI: Tensor | None, rank: int) -> LeadingFactors:
    """The best approximation of up_OR @ down_RI, or of a dense up_OI, at `rank`.

    Of many singular values the leading ones alone are found, by Lanczos iterations (ARPACK), which take time as the product's size times
    `rank`, and not as its cube; what is missing is then the difference of two norms.
    """
    up, down = up_OR.double(), None if down_RI is None else down_RI.double()
    num_values = min(*up.shape, *(() if down is None else down.shape))
    found = _by_lanczos(up, down, rank) if num_values > max(_SMALL, _FEW * rank) else None
    if found is not None:
        whole = float(up.square().sum()) if down is None else squared_norm(up, down)
        return LeadingFactors(found, max(0.0, whole - float(found.values_R.square().sum())), whole)
    every = SingularFactors(*torch.linalg.svd(up, full_matrices=False)) if down is None else singular_factors(up, down)
    squares_R = every.values_R.square()
    return LeadingFactors(every, float(squares_R[rank:].sum()), float(squares_R.sum()))


def _by_lanczos(up: Tensor, down: Tensor | None, rank: int) -> SingularFactors | None:
    """From the largest eigenvalues of the product times its transpose, on its shorter side. None where the iterations come to no end."""
    factors = (up,) if down is None else (up, down)
    if up.shape[0] < factors[-1].shape[1]:
        turned = _by_lanczos(factors[-1].T, up.T if down is not None else None, rank)
        return turned and SingularFactors(turned.down_RI.T, turned.values_R, turned.up_OR.T)

    def through(x: Tensor, matrices: Iterable[Tensor]) -> Tensor:
        for matrix in matrices:
            x = matrix @ x
        return x

    def gram(x: np.ndarray) -> np.ndarray:
        there = through(torch.from_numpy(np.ascontiguousarray(x)), reversed(factors))
        return through(there, [factor.T for factor in factors]).numpy()

    # Start and restarts are drawn from a seed of their own, so that two runs are alike.
    generator, side = np.random.default_rng(0), factors[-1].shape[1]
    operator, start = LinearOperator((side, side), matvec=gram, dtype=np.float64), generator.standard_normal(side)
    try:
        _, columns = eigsh(operator, k=rank, which="LA", v0=start, tol=0, rng=generator)
    except ArpackError:
        return None
    basis_IR = torch.from_numpy(np.ascontiguousarray(columns))
    u_OR, values_R, vh_RR = torch.linalg.svd(through(basis_IR, reversed(factors)), full_matrices=False)
    return SingularFactors(u_OR, values_R, vh_RR @ basis_IR.T)


def row_length(down_RI: Tensor) -> float:
    """Root mean square of the rows' Euclidean norms."""
    return float(down_RI.double().norm()) / down_RI.shape[0] ** 0.5


@num_threads(1)
def aligned(factors: SingularFactors, reference_RI: Tensor, rank: int, length: float) -> tuple[Tensor, Tensor]:
    """Factors (up_OR, down_RI) of the best rank-`rank` approximation whose `down` lies as near to `reference_RI` as a rotation brings it.

    All rows of `down` get the length asked for. The product depends neither on that nor on the reference. The rotation (orthogonal
    Procrustes) keeps an optimizer's moments meaningful where a new product replaces an old one.

    Shapes: reference (any rank, inputs); missing singular values are padded with zeros in `up`.
    """
    down, values, up = factors.down_RI[:rank], factors.values_R[:rank], factors.up_OR[:, :rank]
    overlap_RR = torch.zeros(down.shape[0], down.shape[0], dtype=torch.float64)
    head = reference_RI[: down.shape[0]].double()
    overlap_RR[: head.shape[0]] = head @ down.T
    x, _, yh = torch.linalg.svd(overlap_RR)
    rotation_RR = x @ yh
    return (up * values) @ rotation_RR.T / length, length * (rotation_RR @ down)
