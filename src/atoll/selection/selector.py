"""Which modules are active: scores in, names out. What is scored, and how, is somebody else's work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from atoll import seeding
from atoll.config.schema import RunConfig, Select, Wire
from atoll.errors import PartError, UpdateRefusedError
from atoll.registry.parts import find, make, wrong_result
from atoll.selection.budget import Exchange
from atoll.selection.policy import Choice, ScoreKind, SelectionPolicy
from atoll.selection.pool import PoolModule, pool_of
from atoll.selection.schedule import Schedule, check_schedule
from atoll.shapes import BaseShapes
from atoll.units import counted
from atoll.wire.byte_formulas import WireMode

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
    options: Mapping[str, object] | None = None
    """The policy's own."""
    wire_mode: WireMode = "dense"
    """By which bytes are counted: that of the edge's plan."""

    @property
    def policy(self) -> SelectionPolicy:
        """By whose rule."""
        return make("policy", self.select.policy, self.options)

    @property
    def score_kind(self) -> ScoreKind | None:
        """What a choice needs to know of every module; None where it needs nothing."""
        return measured_by(self.policy, self.select)

    def active(self, step: int, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
        """Names of the modules to train in this step, in pool order: all in a window, or while nothing was chosen."""
        all_of_them = chosen is None or self.schedule.observes(step)
        return tuple(module.name for module in self.pool if all_of_them or module.name in (chosen or ()))

    def choose(self, scores: Mapping[str, float], tokens: StepTokens, steps_done: int) -> tuple[str, ...]:
        """Names of the modules that stay active, in pool order; at least one.

        `scores` has every module of the pool, or may be empty where `score_kind` is None. Of equal scores the first in the pool wins.
        `steps_done`: all steps of the edge so far; a lottery draws by them.

        Raises: UpdateRefusedError where a score is not finite, as the module's values are not either; PartError where the policy chooses
        no module, or one that is not in the pool.
        """
        measured = {} if self.score_kind is None else self._finite(scores)
        num_wanted = tokens.num_tokens if self.keeps_back else tokens.num_label_tokens
        exchange = Exchange(self.d_model, tokens.num_tokens, num_wanted, self.wire.codec, self.wire_mode, self.wire.adapters)
        given = self.policy.choose(self.pool, measured, Choice(self.select, self.seed, steps_done, exchange))
        if not isinstance(given, Iterable):
            raise wrong_result("policy", self.select.policy, "choose", given, "names of modules of the pool")
        chosen = list(given)
        others = [one for one in chosen if one not in {module.name for module in self.pool}]
        if others or not chosen:
            raise PartError(
                f"the policy {self.select.policy} chose what cannot be active", where="[select] policy",
                got=f"{min(map(str, others))}, which is not in the pool" if others else "no module", expected="modules of the pool",
                do='see what it returns with atoll.testing.check("policy", ...)',
            )  # fmt: skip
        return tuple(module.name for module in self.pool if module.name in chosen)

    def _finite(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The scores in pool order."""
        bad = [module.name for module in self.pool if not math.isfinite(scores[module.name])]
        if bad:
            raise UpdateRefusedError(
                "training left the finite numbers: modules cannot be compared", got=f"{scores[bad[0]]} for {bad[0]}, and for"
                f" {len(bad) - 1} other modules of {len(self.pool)}", expected="finite numbers", do="lower learning_rate, or set grad_clip",
            )  # fmt: skip
        return {module.name: scores[module.name] for module in self.pool}


def measured_by(policy: SelectionPolicy, select: Select) -> ScoreKind | None:
    """What the policy wants to know of modules.

    Raises: PartError for what nobody measures.
    """
    kind = policy.measures(select)
    if kind is not None and kind not in get_args(ScoreKind):
        raise wrong_result("policy", select.policy, "measures", kind, f"None, or one of {', '.join(get_args(ScoreKind))}")
    return kind


def schedule_of(select: Select, epoch_steps: int, *, options: Mapping[str, object] | None = None, edge: str = "") -> Schedule:
    """The schedule of an edge whose epochs have so many steps, by its policy.

    Raises: ConflictError where a window is no shorter than its period, so that nothing would ever be killed; PartError where a policy
    gives something else, or observes without saying what.
    """
    policy: SelectionPolicy = make("policy", select.policy, options)
    schedule = policy.schedule(select, epoch_steps)
    if not isinstance(schedule, Schedule):
        raise wrong_result("policy", select.policy, "schedule", schedule, "a Schedule (atoll.selection.schedule)")
    measured = measured_by(policy, select)
    if schedule.ever and (measured is None) != (schedule.window_steps == 0):
        got = f"{measured!r}, beside a window of {counted(schedule.window_steps, 'step')}"
        raise wrong_result("policy", select.policy, "measures", got, "what is measured in a window; None, and no window, where nothing is")
    check_schedule(schedule, select, edge)
    return schedule


def check_schedules(config: RunConfig, rows_per_step: Mapping[str, int], num_rows: Mapping[str, int]) -> None:
    """Whether every edge, and the comparison with all rows, can have a schedule, as far as rows alone can tell.

    `rows_per_step` are those of every edge that takes part, in the order of the configuration.

    Raises: ConflictError where a window is as long as its period.
    """
    if config.data.batching == "pack":
        return  # How many sequences the rows make is known only with their tokens.
    counts = {edge: (num_rows[edge], per_step) for edge, per_step in rows_per_step.items()}
    if "central" in config.run.compare:
        counts["central"] = (sum(num_rows.values()), next(iter(rows_per_step.values())))
    options = config.options_of(config.select.policy)
    for name, (count, per_step) in counts.items():
        schedule_of(config.select, -(-count // per_step), options=options, edge=name)


def selector_of(
    config: RunConfig, shapes: BaseShapes, ranks: Mapping[str, int], *, edge: str, epoch_steps: int, wire_mode: WireMode | None = None
) -> ModuleSelector:  # fmt: skip
    """The selector of one edge, which trains these ranks and has epochs of so many steps.

    An edge without a host, and so without a `wire_mode`, counts bytes as they would be in that of run.toml, "auto" as dense.

    Raises: ConflictError where a window is no shorter than its period.
    """
    options = config.options_of(config.select.policy)
    schedule = schedule_of(config.select, epoch_steps, options=options, edge=edge)
    seed = seeding.stream(config.run.seed, "select", edge=edge)
    pool = pool_of(config, shapes, ranks)
    mode = wire_mode or ("dense" if config.wire.mode == "auto" else config.wire.mode)
    return ModuleSelector(config.select, pool, schedule, seed, shapes.d_model, config.wire, config.model.cut.back > 0, options, mode)


def schedule_warning(selector: ModuleSelector, total_steps: int) -> str | None:
    """What does not come about in so many steps, or costs an eighth of them or more; None where all is well."""
    schedule, steps = selector.schedule, counted(total_steps, "step")
    once = ""
    if schedule.ever and schedule.period_steps is not None and 0 < total_steps <= schedule.period_steps:
        once = f"the first choice stays to the end: every = {schedule.period_steps}, and there are {steps}"
    return "; ".join(text for text in (once, _window_warning(selector, total_steps)) if text) or None


def _window_warning(selector: ModuleSelector, total_steps: int) -> str:
    select, schedule = selector.select, selector.schedule
    share = schedule.full_pool_share(total_steps)
    if share < _MUCH:
        return ""
    # How many somebody else's policy keeps is its own to say.
    known = {"keep": select.keep, "budget": select.budget} if find("policy", select.policy).is_built_in else {}
    active = known.get(select.threshold)
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
