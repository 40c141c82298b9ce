"""Which modules are active: scores in, names out. What is scored, and how, is somebody else's work."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from atoll import seeding
from atoll.config.schema import RunConfig, Select, Wire
from atoll.errors import UpdateRefusedError
from atoll.selection.budget import Exchange, best_within
from atoll.selection.pool import PoolModule, pool_of
from atoll.selection.schedule import Schedule, schedule_of
from atoll.shapes import BaseShapes

ScoreKind = Literal["change", "norm-change", "product-change", "gradient", "magnitude", "saliency"]

_MUCH = 0.125
"""Share of steps in windows from which on a run is warned: at this share, killing even every module saves no more than 87.5 %."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Size of a typical step."""

    num_tokens: int
    """Without padding."""
    num_label_tokens: int


@dataclass(frozen=True, slots=True)
class ModuleSelector:
    """What decides on one edge which modules are active; the same scores always give the same choice."""

    select: Select
    pool: tuple[PoolModule, ...]
    schedule: Schedule
    seed: int
    """Of the stream that random choices come from."""
    d_model: int
    wire: Wire
    keeps_back: bool
    """Whether the device runs blocks behind the host's, and needs every token's hidden state for them."""

    @property
    def score_kind(self) -> ScoreKind | None:
        """What a choice needs to know of every module; None where it needs nothing."""
        if self.select.policy in ("kill-and-revive", "early-kill"):
            return self.select.variation
        if self.select.policy == "magnitude":
            return "magnitude"
        return "saliency" if self.select.policy == "snip" else None

    def active(self, step: int, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
        """Names of the modules to train in this step, in pool order: all in a window, or while nothing was chosen."""
        whole = chosen is None or self.schedule.observes(step)
        return tuple(module.name for module in self.pool if whole or module.name in (chosen or ()))

    def choose(self, scores: Mapping[str, float], tokens: StepTokens, steps_done: int) -> tuple[str, ...]:
        """Names of the modules that stay active, in pool order; at least one.

        `scores` has every module of the pool, or may be empty where `score_kind` is None. Of equal scores the first in the pool wins.
        `steps_done`: all steps of the edge so far; a lottery draws by them.

        Raises: UpdateRefusedError where a score is not finite, as the module's values are not either.
        """
        if self.score_kind is not None:
            chosen = self._by_score(self._finite(scores), tokens, steps_done)
        elif self.select.policy == "random":
            # By name and not by position: a module's lot does not depend on what else is in the pool.
            lots = [-seeding.stream(self.seed, module.name) for module in self.pool]
            chosen = _highest(lots, self._num_kept)
        elif self.select.policy == "last-layers":
            chosen = range(len(self.pool) - self._num_kept, len(self.pool))
        else:
            chosen = range(len(self.pool))
        return tuple(self.pool[number].name for number in sorted(chosen))

    @property
    def _num_kept(self) -> int:
        # The share as it is written: 0.29 of 100 modules are 29, and in binary fractions they would be 28.
        return max(1, math.floor(Fraction(repr(self.select.keep)) * len(self.pool)))

    def _by_score(self, scores: Sequence[float], tokens: StepTokens, steps_done: int) -> Iterable[int]:
        if self.select.threshold == "budget":
            num_wanted = tokens.num_tokens if self.keeps_back else tokens.num_label_tokens
            exchange = Exchange(self.d_model, tokens.num_tokens, num_wanted, self.wire.codec, self.wire.mode)
            return best_within(self.pool, scores, exchange, self.select.budget)
        if self.select.threshold == "keep":
            return _highest(scores if self.select.draw == "highest" else self._lots(scores, steps_done), self._num_kept)
        threshold = self._threshold(scores)
        above = [number for number, score in enumerate(scores) if Fraction(score) > threshold]
        return above or _highest(scores, 1)

    def _lots(self, scores: Sequence[float], steps_done: int) -> list[float]:
        """The highest ones are a draw without replacement, with chances in proportion to the scores; a score of 0 draws last.

        Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006), in logarithms: log(u) / score, u in (0, 1].
        """
        # By name and step, so that a run that goes on after a stop draws what it would have drawn.
        uniform = [(seeding.stream(self.seed, module.name, round=steps_done) + 1) / 2**63 for module in self.pool]
        # Over a score that is hardly more than nothing, the quotient would be as infinite as over nothing.
        least = -sys.float_info.max
        return [max(least, math.log(u) / score) if score > 0 else -math.inf for u, score in zip(uniform, scores, strict=True)]

    def _threshold(self, scores: Sequence[float]) -> Fraction:
        """Exact, so that equal scores are all at their mean and none above it."""
        if self.select.threshold == "mean":
            return Fraction(repr(self.select.mean_factor)) * sum(map(Fraction, scores)) / len(scores)
        assert self.select.least_variation is not None, "the configuration is checked"
        return Fraction(self.select.least_variation)

    def _finite(self, scores: Mapping[str, float]) -> list[float]:
        """The scores in pool order."""
        bad = [module.name for module in self.pool if not math.isfinite(scores[module.name])]
        if bad:
            raise UpdateRefusedError(
                "training left the finite numbers: modules cannot be compared", got=f"{scores[bad[0]]} for {bad[0]}, and for"
                f" {len(bad) - 1} other modules of {len(self.pool)}", expected="finite numbers", do="lower learning_rate, or set grad_clip",
            )  # fmt: skip
        return [scores[module.name] for module in self.pool]


def selector_of(config: RunConfig, shapes: BaseShapes, ranks: Mapping[str, int], *, edge: str, epoch_steps: int) -> ModuleSelector:
    """The selector of one edge, which trains these ranks and has epochs of so many steps.

    Raises: ConflictError where a window is no shorter than its period.
    """
    schedule = schedule_of(config.select, epoch_steps, edge=edge)
    seed = seeding.stream(config.run.seed, "select", edge=edge)
    pool = pool_of(config, shapes, ranks)
    return ModuleSelector(config.select, pool, schedule, seed, shapes.d_model, config.wire, config.model.cut.back > 0)


def full_pool_warning(selector: ModuleSelector, total_steps: int) -> str | None:
    """What windows cost, where they are an eighth of so many steps or more; None where they are less, or there is none."""
    select, schedule = selector.select, selector.schedule
    share = schedule.full_pool_share(total_steps)
    if share < _MUCH:
        return None
    active = {"keep": select.keep, "budget": select.budget}.get(select.threshold)
    saving = (1 - share) * (1 - (active or 0.0))
    product = f"(1 - {share:.3g})" + (f" x (1 - {active:.3g})" if active is not None else "")
    return (
        f"{share:.1%} of {total_steps} steps are in windows of observation with every module active, so that killing the others saves at"
        f" best {product} = {saving:.1%} of what the full pool costs; {_advice(schedule, total_steps)}"
    )


def _advice(schedule: Schedule, total_steps: int) -> str:
    """The longest window and the shortest period that would do."""

    def first(changed: Iterable[Schedule]) -> Schedule | None:
        return next((one for one in changed if one.full_pool_share(total_steps) < _MUCH), None)

    window = first(dataclasses.replace(schedule, window_steps=steps) for steps in range(schedule.window_steps - 1, 0, -1))
    longer = range(schedule.period_steps + 1, total_steps + 1) if schedule.period_steps is not None else ()
    period = first(dataclasses.replace(schedule, period_steps=steps) for steps in longer)
    ways = [f"observe_steps = {window.window_steps}"] if window is not None else []
    ways += [f"every = {period.period_steps}"] if period is not None else []
    return f"write {' or '.join(ways)} below [select]" if ways else "train for more steps"


def _highest(values: Sequence[float], count: int) -> Sequence[int]:
    return sorted(range(len(values)), key=lambda number: (-values[number], number))[:count]
