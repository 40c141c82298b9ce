"""Kill-and-Revive: train all modules for a window, rank them by how they moved, kill the others; later revive all and look again.

Source: DLoRA (Gao and Zhang, EMNLP Findings 2024, arXiv 2404.05182). Known of it: the monitored quantity is the l2-norm variation of each
module (Fig. 3); modules below a threshold are killed early, and killed ones are revived at the end of an epoch. What is not known is an
option of [select], with a default that is Atoll's own. What becomes of a killed module: adapters/killed.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from atoll.config.schema import Select
from atoll.selection.choose_by_score import by_score
from atoll.selection.policy import Choice, ScoreKind
from atoll.selection.pool import PoolModule
from atoll.selection.schedule import Schedule, window_steps


class EarlyKill:
    """One window and one choice: nothing is revived."""

    def measures(self, select: Select) -> ScoreKind | None:
        """The variation."""
        return select.variation

    def schedule(self, select: Select, epoch_steps: int) -> Schedule:
        """A window at the start."""
        return Schedule.once(window_steps(select, epoch_steps))

    def choose(self, pool: Sequence[PoolModule], scores: Mapping[str, float], choice: Choice) -> Iterable[str]:
        """What moves most."""
        return by_score(pool, scores, choice)


class KillAndRevive(EarlyKill):
    """A window and a choice in every period."""

    repeats = True

    def schedule(self, select: Select, epoch_steps: int) -> Schedule:
        """Every epoch, or so many steps."""
        period_steps = epoch_steps if select.every == "epoch" else select.every
        return Schedule.periodic(window_steps(select, epoch_steps), period_steps)
