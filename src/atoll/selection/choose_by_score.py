"""How many modules stay active, and which, by their scores: [select] threshold and draw."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from atoll import seeding
from atoll.config.schema import Select
from atoll.selection.budget import best_within
from atoll.selection.policy import Choice, highest
from atoll.selection.pool import PoolModule


def by_score(pool: Sequence[PoolModule], scores: Mapping[str, float], choice: Choice) -> Iterable[str]:
    """The share `keep`, what is above a threshold, or the best within a byte budget; at least one."""
    select = choice.select
    if select.threshold == "budget":
        chosen = best_within(pool, [scores[module.name] for module in pool], choice.exchange, select.budget)
        return [pool[number].name for number in chosen]
    if select.threshold == "keep":
        return highest(scores if select.draw == "highest" else lots(scores, choice), choice.num_kept(pool))
    least = _least(select, scores)
    return [name for name, score in scores.items() if Fraction(score) > least] or highest(scores, 1)


def lots(scores: Mapping[str, float], choice: Choice) -> dict[str, float]:
    """The highest ones are a draw without replacement, with chances in proportion to the scores; a score of 0 draws last.

    Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006), in logarithms: log(u) / score, u in (0, 1].
    """
    # By name and step, so that a run that goes on after a stop draws what it would have drawn.
    uniform = {name: (seeding.stream(choice.seed, name, round=choice.steps_done) + 1) / 2**63 for name in scores}
    # Over a score that is hardly more than nothing, the quotient would be as infinite as over nothing.
    least = -sys.float_info.max
    return {name: max(least, math.log(uniform[name]) / score) if score > 0 else -math.inf for name, score in scores.items()}


def _least(select: Select, scores: Mapping[str, float]) -> Fraction:
    """Exact, so that equal scores are all at their mean and none above it."""
    if select.threshold == "mean":
        return Fraction(repr(select.mean_factor)) * sum(map(Fraction, scores.values())) / len(scores)
    assert select.least_variation is not None, "the configuration is checked"
    return Fraction(select.least_variation)
