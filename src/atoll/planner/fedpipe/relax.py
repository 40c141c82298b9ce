"""The relaxed knapsack: the least of all Lagrange bounds on the worth of one option a stage, under two limits of 1.

The bound is convex and made of planes, one for each choice of options; they are found one by one (Kelley 1960, cutting planes). With two
prices the lowest point of a few planes is found by trying all pairs of lines in which they meet.

Array suffixes: S stages, O options of a stage, L limits (two), K planes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_CUTS = 60
_HIGHEST = 1e6
"""Price of a whole limit, in shares of the worth of everything."""
_ENDS = np.array([[-1.0, 0.0], [0.0, -1.0], [1.0, 0.0], [0.0, 1.0]]), np.array([0.0, 0.0, _HIGHEST, _HIGHEST])
_EXACT = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """What no choice can exceed, and the choices that tie there."""

    bound: float
    prices_L: Array
    """Of a whole limit."""
    picks_KS: NDArray[np.intp]
    """Options by stage of choices that are worth most at these prices."""


def relaxed(values_SO: Array, uses_SOL: Array, near_L: Array) -> Relaxed:
    """The least bound; every stage has an option that is worth at least 0. Prices are looked for from those that may be near.

    Source: Lagrange relaxation of the multiple-choice knapsack; its least bound is that of the problem with fractions of options.
    """
    scale = max(float(values_SO.max(axis=1).sum()), 1e-300)
    worth_SO, rows = values_SO / scale, np.arange(len(values_SO))
    heights, slopes, choices = np.zeros(_CUTS), np.zeros((_CUTS, 2)), np.zeros((_CUTS, len(values_SO)), dtype=np.intp)
    least, bound, prices_L, best_L, num_cuts = -np.inf, np.inf, np.clip(near_L / scale, 0.0, _HIGHEST), np.zeros(2), 0
    for number in range(_CUTS):
        picks = (worth_SO - uses_SOL @ prices_L).argmax(axis=1)
        height, slope = worth_SO[rows, picks].sum(), 1.0 - uses_SOL[rows, picks].sum(axis=0)
        here = float(height + slope @ prices_L)
        if here < bound:
            bound, best_L = here, prices_L
        heights[number], slopes[number], choices[number], num_cuts = height, slope, picks, number + 1
        if here <= least + _EXACT:
            break
        lowest = _lowest_point(heights[:num_cuts], slopes[:num_cuts])
        if lowest is None:
            break
        prices_L, least = lowest
    ties = heights[:num_cuts] + slopes[:num_cuts] @ best_L >= bound - 10 * _EXACT
    return Relaxed(bound * scale, best_L * scale, choices[:num_cuts][ties])


@lru_cache(2 * _CUTS)
def _pairs(count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    one, other = np.triu_indices(count, 1)
    return one, other


def _lowest_point(heights_K: Array, slopes_KL: Array) -> tuple[Array, float] | None:
    """Where the highest of the planes is lowest, and how high it is there; the last plane is one that meets there.

    None where rounding hides the point.
    """
    height, slope = heights_K[-1], slopes_KL[-1]
    # On the last plane, the others and the ends of the prices are lines a . p <= b.
    a = np.concatenate([slopes_KL[:-1] - slope, _ENDS[0]])
    b = np.concatenate([height - heights_K[:-1], _ENDS[1]])
    one, other = _pairs(len(b))
    (x, y), (other_x, other_y), (c, other_c) = a[one].T, a[other].T, (b[one], b[other])
    crossed = x * other_y - y * other_x
    crossed[np.abs(crossed) <= 1e-14] = np.nan
    points = np.stack([c * other_y - other_c * y, x * other_c - other_x * c]) / crossed
    above = (a @ points - b[:, None]).max(axis=0)
    levels = np.where(above <= 1e-11 * (1.0 + np.abs(points).max(axis=0)), slope @ points, np.inf)
    lowest = int(np.argmin(levels))
    if levels[lowest] == np.inf:
        return None
    return np.maximum(points[:, lowest], 0.0), float(height + levels[lowest])
