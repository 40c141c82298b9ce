"""Which modules an edge trains, stretch by stretch: a Chooser's answers, and the observation that its choices need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atoll.adapters.attach import Attached, Killed
from atoll.adapters.layers import LowRankPair
from atoll.adapters.movement import MOVEMENTS
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.engines.trainer import StepReport, Turn, Watch
from atoll.selection.choosing import Chooser, StepTokens


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps with the same active modules."""

    killed: Killed
    end: int | None
    """Number of the first step after it; None: it does not end."""
    turn: Turn | None
    """None: the last fit ended within this stretch."""


class Watcher:
    """Goes through a fit of one edge. Without a `chooser` every module is active all the time."""

    def __init__(self, chooser: Chooser | None, watch: Watch, adapter: AdapterState) -> None:
        self._chooser, self._watch = chooser, watch
        self._reference = adapter if watch.moved is None else _minus(adapter, watch.moved)
        self._sums = dict(watch.sums)

    def stretch(self, step: int) -> Stretch:
        """The stretch that step number `step` is in."""
        chooser, watch = self._chooser, self._watch
        if chooser is None:
            return Stretch(Killed(), None, None)
        if watch.chosen is None and chooser.schedule.ever and not chooser.schedule.window_steps:
            self._choose({}, step)  # Nothing is observed before: such a choice is made at once.
        active = chooser.active(step, self._watch.chosen)
        killed = tuple(module.name for module in chooser.pool if module.name not in active)
        return Stretch(Killed(killed, chooser.select.killed), chooser.schedule.until(step), self._turn(step, active, killed))

    def see(self, adapters: Attached, report: StepReport) -> None:
        """Take a step into account, right after it."""
        chooser, watch = self._chooser, self._watch
        if chooser is None or not chooser.schedule.observes(report.step):
            return
        if chooser.score_kind in ("gradient", "saliency"):
            for name, layer in adapters.layers.items():
                of = _gradient_norm if chooser.score_kind == "gradient" else _saliency
                self._sums[name] = self._sums.get(name, 0.0) + of(layer)
        self._watch = Watch(
            watch.chosen, watch.scores, None, self._sums, watch.num_steps + 1, watch.num_tokens + report.num_tokens,
            watch.num_label_tokens + report.num_label_tokens,
        )  # fmt: skip

    def end(self, steps_done: int, adapter: AdapterState) -> None:
        """A stretch ended: make the choice that is due after a window."""
        chooser = self._chooser
        if chooser is None:
            return
        if chooser.schedule.decides(steps_done) and self._watch.num_steps:
            self._choose(self._scores(adapter), steps_done)
        if not self._watch.num_steps:
            self._reference = adapter  # Where the next window's movement counts from.

    def watch(self, adapter: AdapterState) -> Watch:
        """What the next fit goes on from."""
        watch = self._watch
        moved = _minus(adapter, self._reference) if watch.num_steps else None
        return Watch(watch.chosen, watch.scores, moved, watch.sums, watch.num_steps, watch.num_tokens, watch.num_label_tokens)

    def _choose(self, scores: Mapping[str, float], steps_done: int) -> None:
        assert self._chooser is not None
        steps = max(1, self._watch.num_steps)
        tokens = StepTokens(round(self._watch.num_tokens / steps), round(self._watch.num_label_tokens / steps))
        self._watch, self._sums = Watch(self._chooser.choose(scores, tokens, steps_done), scores), {}

    def _scores(self, adapter: AdapterState) -> dict[str, float]:
        assert self._chooser is not None
        kind = self._chooser.score_kind
        if kind in ("gradient", "saliency"):
            sizes = {name: adapter.modules[name].num_parameters for name in self._sums}
            per = {name: size**0.5 if kind == "gradient" else size for name, size in sizes.items()}
            return {name: total / self._watch.num_steps / per[name] for name, total in self._sums.items()}
        assert kind is not None
        movement, before = MOVEMENTS[kind], self._reference.modules
        return {module.name: movement(before[module.name], adapter.modules[module.name]) for module in self._chooser.pool}

    def _turn(self, step: int, active: tuple[str, ...], killed: tuple[str, ...]) -> Turn | None:
        chooser = self._chooser
        assert chooser is not None
        if not chooser.schedule.ever or (step > 0 and chooser.schedule.until(step - 1) != step):
            return None
        if not chooser.schedule.observes(step):
            return Turn("choice", killed, (), self._watch.scores)
        before = self._watch.chosen or active
        return Turn("window", (), tuple(name for name in active if name not in before), {})


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
