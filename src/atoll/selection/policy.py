"""The seam of selection: a policy says what is measured of modules and when, and which of them stay active."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from atoll.config.schema import Select
from atoll.selection.budget import Exchange
from atoll.selection.pool import PoolModule
from atoll.selection.schedule import Schedule

ScoreKind = Literal["change", "norm-change", "product-change", "gradient", "magnitude", "saliency"]
"""What can be measured of a module: select.variation, the size of its parameters, or |parameter x gradient|."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one choice is made for."""

    select: Select
    seed: int
    """Of the stream that random choices come from, named by module and step: a run that goes on after a stop draws the same."""
    steps_done: int
    """All steps of the edge so far."""
    exchange: Exchange
    """One training exchange of a typical step with a host, for what a choice costs in bytes."""

    def num_kept(self, pool: Sequence[PoolModule]) -> int:
        """Modules that the share `keep` comes to, at least one."""
        # The share as it is written: 0.29 of 100 modules are 29, and in binary fractions they would be 28.
        return max(1, math.floor(Fraction(repr(self.select.keep)) * len(pool)))


class SelectionPolicy(Protocol):
    """A policy, made anew for every edge. It keeps nothing from one choice to another: the same scores always give the same choice.

    Its class may say `trains_all` (nothing is ever chosen), `observes` (False: it has no window) and `repeats` (its windows come again).
    """

    def measures(self, select: Select) -> ScoreKind | None:
        """What a choice needs to know of every module; None where it needs nothing."""

    def schedule(self, select: Select, epoch_steps: int) -> Schedule:
        """When modules are observed and chosen, on an edge whose epochs have so many steps."""

    def choose(self, pool: Sequence[PoolModule], scores: Mapping[str, float], choice: Choice) -> Iterable[str]:
        """Names of the modules that stay active, at least one, in any order.

        `scores` has every module of the pool, in its order and finite, or is empty where nothing is measured.
        """


def highest(scores: Mapping[str, float], count: int) -> list[str]:
    """Names of so many modules with the highest scores; of equal scores the first in the pool wins."""
    return sorted(scores, key=lambda name: -scores[name])[:count]
