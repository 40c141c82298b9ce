"""The largest singular values alone, against all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atoll.adapters.low_rank import SingularFactors, leading_factors, singular_factors

RANK = 8


def factors(outputs: int, inner: int, inputs: int, decay: float) -> tuple[Tensor, Tensor]:
    """Of a product whose parts become smaller by `decay` each."""
    generator = torch.Generator().manual_seed(outputs + inner)
    up = torch.randn(outputs, inner, generator=generator, dtype=torch.float64) * decay ** torch.arange(inner)
    return up, torch.randn(inner, inputs, generator=generator, dtype=torch.float64)


def product(found: SingularFactors) -> Tensor:
    return (found.up_OR[:, :RANK] * found.values_R[:RANK]) @ found.down_RI[:RANK]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.97])
@pytest.mark.parametrize(("outputs", "inner", "inputs"), [(400, 300, 350), (300, 280, 600), (90, 60, 80)])
def test_the_leading_ones_equal_those_of_all(outputs: int, inner: int, inputs: int, decay: float, dense: bool) -> None:
    up, down = factors(outputs, inner, inputs, decay)
    every = singular_factors(up, down)
    leading = leading_factors(*((up @ down, None) if dense else (up, down)), RANK)
    torch.testing.assert_close(leading.factors.values_R[:RANK], every.values_R[:RANK], rtol=1e-12, atol=0)
    torch.testing.assert_close(product(leading.factors), product(every), rtol=0, atol=1e-11 * float(every.values_R[0]))
    squares = every.values_R.square()
    assert leading.whole == pytest.approx(float(squares.sum()), rel=1e-12)
    assert leading.missed == pytest.approx(float(squares[RANK:].sum()), rel=1e-10)
    assert len(leading.factors.values_R) == RANK or min(outputs, inner) <= 256, "small ones are found whole"


def test_nothing_and_less_than_asked_for_are_found_as_well() -> None:
    nothing = leading_factors(torch.zeros(300, 300), None, RANK)
    assert (float(product(nothing.factors).abs().max()), nothing.missed, nothing.whole) == (0.0, 0.0, 0.0)
    up, down = factors(400, 3, 300, 1.0)
    thin = leading_factors(up @ down, None, RANK)
    torch.testing.assert_close(product(thin.factors), up @ down, rtol=0, atol=1e-10)
    assert thin.missed <= 1e-12 * thin.whole


def only(rows: int) -> Tensor:
    """A matrix with so many rows that are not zero: iterations that start in it end, and begin anew elsewhere."""
    return torch.cat([torch.ones(rows, 300), torch.zeros(300 - rows, 300)]).double()


@pytest.mark.parametrize("matrix", [factors(400, 300, 350, 0.97), only(1), only(3), torch.eye(300).double(), torch.ones(300, 300).double()])
def test_two_runs_find_the_same_bits(matrix: Tensor | tuple[Tensor, Tensor]) -> None:
    up, down = (matrix, None) if isinstance(matrix, Tensor) else matrix
    found = [leading_factors(up, down, RANK).factors for _ in range(3)]
    assert all(torch.equal(found[0].up_OR, one.up_OR) and torch.equal(found[0].down_RI, one.down_RI) for one in found)
