"""The singular value decomposition of a product of two thin matrices, without forming the product.

Shape suffixes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.threads import num_threads


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
