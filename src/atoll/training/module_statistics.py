"""Which modules an edge trains, segment by segment: what a ModuleSelector says, and the observation that its choices need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from atoll.adapters.attach import Attached
from atoll.adapters.killed import Killed
from atoll.adapters.layers import LowRankPair
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.selection.selector import ModuleSelector, StepTokens
from atoll.training.movement import MOVEMENTS
from atoll.training.trainer import ActiveSetChange, ModuleStatistics, StepReport


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive steps with the same active modules."""

    killed: Killed
    end: int | None
    """Number of the first step after it; None: it does not end."""
    active_change: ActiveSetChange | None
    """None: the last fit ended within this segment."""


class ModuleMonitor:
    """Goes through a fit of one edge. Without a `selector` every module is active all the time."""

    def __init__(self, selector: ModuleSelector | None, statistics: ModuleStatistics, adapter: AdapterState) -> None:
        self._selector, self._statistics = selector, statistics
        self._reference = adapter if statistics.moved is None else _minus(adapter, statistics.moved)
        self._sums = dict(statistics.sums)

    def segment(self, step: int) -> Segment:
        """The segment that step number `step` is in."""
        selector, statistics = self._selector, self._statistics
        if selector is None:
            return Segment(Killed(), None, None)
        if statistics.chosen is None and selector.schedule.ever and not selector.schedule.window_steps:
            self._choose({}, step)  # Nothing is observed before: such a choice is made at once.
        active = selector.active(step, self._statistics.chosen)
        killed = tuple(module.name for module in selector.pool if module.name not in active)
        return Segment(Killed(killed, selector.select.killed), selector.schedule.until(step), self._active_change(step, active, killed))

    def see(self, adapters: Attached, report: StepReport) -> None:
        """Take a step into account, right after it."""
        selector, statistics = self._selector, self._statistics
        if selector is None or not selector.schedule.observes(report.step):
            return
        if selector.score_kind in ("gradient", "saliency"):
            for name, layer in adapters.layers.items():
                of = _gradient_norm if selector.score_kind == "gradient" else _saliency
                self._sums[name] = self._sums.get(name, 0.0) + of(layer)
        self._statistics = ModuleStatistics(
            statistics.chosen, statistics.scores, None, self._sums, statistics.num_steps + 1, statistics.num_tokens + report.num_tokens,
            statistics.num_label_tokens + report.num_label_tokens,
        )  # fmt: skip

    def end(self, steps_done: int, adapter: AdapterState) -> None:
        """A segment ended: make the choice that is due after a window."""
        selector = self._selector
        if selector is None:
            return
        if selector.schedule.decides(steps_done) and self._statistics.num_steps:
            self._choose(self._scores(adapter), steps_done)
        if not self._statistics.num_steps:
            self._reference = adapter  # Where the next window's movement counts from.

    def statistics(self, adapter: AdapterState) -> ModuleStatistics:
        """What the next fit goes on from."""
        statistics = self._statistics
        moved = _minus(adapter, self._reference) if statistics.num_steps else None
        return replace(statistics, moved=moved)

    def _choose(self, scores: Mapping[str, float], steps_done: int) -> None:
        assert self._selector is not None
        steps = max(1, self._statistics.num_steps)
        tokens = StepTokens(round(self._statistics.num_tokens / steps), round(self._statistics.num_label_tokens / steps))
        self._statistics, self._sums = ModuleStatistics(self._selector.choose(scores, tokens, steps_done), scores), {}

    def _scores(self, adapter: AdapterState) -> dict[str, float]:
        assert self._selector is not None
        kind = self._selector.score_kind
        if kind in ("gradient", "saliency"):
            sizes = {name: adapter.modules[name].num_parameters for name in self._sums}
            per = {name: size**0.5 if kind == "gradient" else size for name, size in sizes.items()}
            return {name: total / self._statistics.num_steps / per[name] for name, total in self._sums.items()}
        assert kind is not None
        movement, before = MOVEMENTS[kind], self._reference.modules
        return {module.name: movement(before[module.name], adapter.modules[module.name]) for module in self._selector.pool}

    def _active_change(self, step: int, active: tuple[str, ...], killed: tuple[str, ...]) -> ActiveSetChange | None:
        selector = self._selector
        assert selector is not None
        if not selector.schedule.ever or (step > 0 and selector.schedule.until(step - 1) != step):
            return None
        if not selector.schedule.observes(step):
            return ActiveSetChange("choice", killed, (), self._statistics.scores)
        before = self._statistics.chosen or active
        return ActiveSetChange("window", (), tuple(name for name in active if name not in before), {})


def _gradient_norm(pair: LowRankPair) -> float:
    return sum(matrix.grad.square().sum().item() for matrix in (pair.down_RI, pair.up_OR) if matrix.grad is not None) ** 0.5


def _saliency(pair: LowRankPair) -> float:
    """Sum of |parameter x gradient|. Source: SNIP (Lee, Ajanthan, Torr, 2019), eq. 3, without its normalisation."""
    return sum((matrix * matrix.grad).abs().sum().item() for matrix in (pair.down_RI, pair.up_OR) if matrix.grad is not None)


def _minus(a: AdapterState, b: AdapterState) -> AdapterState:
    modules = {
        name: ModuleAdapter(one.down_RI - b.modules[name].down_RI, one.up_OR - b.modules[name].up_OR, one.scaling)
        for name, one in a.modules.items()
    }
    return AdapterState(a.kind, modules)
