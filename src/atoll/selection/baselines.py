"""What Kill-and-Revive is compared with: the full pool, modules by lot, the last ones, and those with the largest parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from atoll import seeding
from atoll.config.schema import Select
from atoll.selection.kill_and_revive import EarlyKill
from atoll.selection.policy import Choice, ScoreKind, highest
from atoll.selection.pool import PoolModule
from atoll.selection.schedule import Schedule


class All:
    """Every module, all the time."""

    trains_all = True
    observes = False

    def measures(self, select: Select) -> ScoreKind | None:
        """Nothing."""
        return None

    def schedule(self, select: Select, epoch_steps: int) -> Schedule:
        """Nothing is ever chosen."""
        return Schedule.never()

    def choose(self, pool: Sequence[PoolModule], scores: Mapping[str, float], choice: Choice) -> Iterable[str]:
        """All."""
        return [module.name for module in pool]


class Random:
    """By lot, before the first step."""

    observes = False

    def measures(self, select: Select) -> ScoreKind | None:
        """Nothing."""
        return None

    def schedule(self, select: Select, epoch_steps: int) -> Schedule:
        """Before the first step."""
        return Schedule.at_start()

    def choose(self, pool: Sequence[PoolModule], scores: Mapping[str, float], choice: Choice) -> Iterable[str]:
        """The lowest lots."""
        # By name and not by position: a module's lot does not depend on what else is in the pool.
        return highest({module.name: -seeding.stream(choice.seed, module.name) for module in pool}, choice.num_kept(pool))


class LastLayers(Random):
    """The last modules in execution order."""

    def choose(self, pool: Sequence[PoolModule], scores: Mapping[str, float], choice: Choice) -> Iterable[str]:
        """From the end."""
        return [module.name for module in pool[-choice.num_kept(pool) :]]


class Magnitude(EarlyKill):
    """By the root mean square of the adapter's parameters after one window."""

    def measures(self, select: Select) -> ScoreKind | None:
        """The size of the parameters."""
        return "magnitude"
