"""The ranks of most worth under limits of memory and time: a multiple-choice knapsack for each lowest adapted stage.

Array suffixes: S stages, O options of a stage (padded), L limits (two, of which the second may be none), K cuts.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csc_array, vstack

from atoll.planner.fedpipe.relax import Relaxed, relaxed
from atoll.planner.fedpipe.table import KINDS, Array, Stage, StageOptions

GAP = 4e-3
"""Share of the objective that may be left on the table. What is left in the mean is far less; the proof that it is takes the time."""
SMALL, SMALL_GAP = 64, 1e-6
"""Up to so many weights, next to nothing is left."""
_ROUNDING, _SLACK = 1e-12, 1e-9
"""What floating point may add to a sum: share of a limit, and of what is free of it."""
_TOLERANCE = 1e-6
"""Of HiGHS, by which a limit may be exceeded."""
_NODES, _COMBINATIONS = 20_000, 20_000
"""Nodes of branch and bound; a limit of time would give other plans on a busy machine. Combinations of options that tie."""
_NEVER = -1e300
"""Worth of an option that is not there."""
Picks = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Limit:
    """What may be used in all: weights by kind of cost, as a table has them, and how much of their sum."""

    weights: tuple[float, float, float, float, float, float]
    most: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best choice: ranks by module name, those that are 0 left out, and what it is worth."""

    ranks: dict[str, int]
    objective: float


def best_ranks(
    stages: Sequence[Stage], limits: Sequence[Limit], *, better_than: float = 0.0, at_most: float = math.inf
) -> Chosen | None:
    """The choice of most worth that keeps up to two limits, to within SMALL_GAP or GAP; None where none of at least one adapter does.

    Only a choice `better_than` what is known already is looked for; `at_most` says what none can exceed, where that is known.

    Source: decision 0010. With the lowest adapted stage given, what remains is a sum over stages; the relaxed problem bounds every such
    choice from above, and only those that may hold the best are solved.
    """
    whole = _everything(stages, limits)
    if whole is not None or not stages:
        return whole if whole is not None and whole.objective > better_than else None
    search = _Search(stages, limits, better_than, at_most)
    while (number := search.most_promising()) is not None:
        search.look_at(number)
    return search.best


def _everything(stages: Sequence[Stage], limits: Sequence[Limit]) -> Chosen | None:
    """The choice of most worth where it keeps every limit, as it does on most machines: no search at all."""
    if not stages:
        return None
    above, lowest = _padded(tuple(stages))
    number = int(np.argmax(lowest.values_SO.max(axis=1) > 0.0))
    picks, rows = above.values_SO.argmax(axis=1)[number:], np.arange(number + 1, len(stages))
    picks[0] = lowest.values_SO[number].argmax()
    costs_C = lowest.costs_SOC[number, picks[0]] + above.costs_SOC[rows, picks[1:]].sum(axis=0)
    if any(float(np.dot(limit.weights, costs_C)) > limit.most * (1 + _ROUNDING) for limit in limits):
        return None
    return _chosen(stages, number, picks)


def _chosen(stages: Sequence[Stage], lowest: int, picks: Sequence[int] | Picks) -> Chosen:
    ranks: dict[str, int] = {}
    objective = 0.0
    for number, pick in enumerate(picks, start=lowest):
        options = stages[number].lowest if number == lowest else stages[number].above
        objective += float(options.values_O[pick])
        ranks |= {module.name: rank for module, rank in zip(stages[number].modules, options.ranks[pick], strict=True) if rank}
    return Chosen(ranks, objective)


class _Search:
    """Over the lowest adapted stage: bounds for all, and the exact answer for those whose bound is above the best so far."""

    def __init__(self, stages: Sequence[Stage], limits: Sequence[Limit], better_than: float, at_most: float) -> None:
        self._stages, self._better_than = stages, better_than
        self._gap = SMALL_GAP if sum(len(stage.modules) for stage in stages) <= SMALL else GAP
        self.best: Chosen | None = None
        weights_CL = np.zeros((KINDS, 2))
        for number, limit in enumerate(limits):
            weights_CL[:, number] = np.array(limit.weights) / limit.most
        above, lowest = _padded(tuple(stages))
        self._above_values, self._above_uses = above.values_SO, above.costs_SOC @ weights_CL
        self._lowest_values, self._lowest_uses = lowest.values_SO, lowest.costs_SOC @ weights_CL
        can_be_lowest = np.any(np.all(self._lowest_uses <= 1.0 + _ROUNDING, axis=2) & (self._lowest_values > 0.0), axis=1)
        self._bound = np.where(can_be_lowest, at_most, -np.inf)
        self._relaxed: dict[int, Relaxed] = {}
        self._near_L = np.zeros(2)
        self._tighten(np.zeros(2))

    def most_promising(self) -> int | None:
        """The lowest stage whose bound is highest; None where none can be better than the best known."""
        number = int(np.argmax(self._bound))
        return number if self._bound[number] > self._known * (1 + self._gap) + 1e-12 else None

    @property
    def _known(self) -> float:
        return self.best.objective if self.best is not None else self._better_than

    def look_at(self, number: int) -> None:
        """Bound this one by its relaxation; the second time, solve it."""
        problem = self._problem(number)
        if number in self._relaxed:
            self._solve(number, problem)
            return
        self._relaxed[number] = found = relaxed(problem.values_SO, problem.uses_SOL, self._near_L * problem.free_L)
        self._bound[number] = min(self._bound[number], found.bound)
        self._near_L = found.prices_L / problem.free_L
        self._tighten(self._near_L)
        if self._bound[number] > self._known:
            self._offer(number, problem, problem.filled(problem.rounded(found)))

    def _problem(self, lowest: int) -> _Problem:
        """One of the options of every stage from the lowest on."""
        # Beside what it takes to train at all, adapters are small: in shares of the whole limit they would drown in the solver's tolerance.
        there = self._lowest_values[lowest] > _NEVER
        least_L = self._lowest_uses[lowest][there].min(axis=0)
        free_L = np.maximum(1.0 - least_L, _ROUNDING)
        width = max(self._lowest_values.shape[1], self._above_values.shape[1])
        values = np.full((len(self._stages) - lowest, width), _NEVER)
        uses = np.zeros((*values.shape, 2))
        values[0, : self._lowest_values.shape[1]] = self._lowest_values[lowest]
        uses[0, : self._lowest_values.shape[1]] = (self._lowest_uses[lowest] - least_L) / free_L
        values[1:, : self._above_values.shape[1]] = self._above_values[lowest + 1 :]
        uses[1:, : self._above_values.shape[1]] = self._above_uses[lowest + 1 :] / free_L
        values[np.any(uses > 1.0 + _SLACK, axis=2)] = _NEVER
        return _Problem(values, uses, free_L)

    def _offer(self, number: int, problem: _Problem, picks: Picks) -> bool:
        """Keep this choice if it keeps the limits and is the best so far; whether it keeps them."""
        above = np.arange(number + 1, len(self._stages))
        used_L = self._lowest_uses[number, picks[0]] + self._above_uses[above, picks[1:]].sum(axis=0)
        if np.any(used_L > 1.0 + _ROUNDING) or problem.value(picks) < 0.0:
            return False
        if problem.value(picks) > self._known * (1 - 1e-9):
            found = _chosen(self._stages, number, picks)
            self.best = found if found.objective > self._known else self.best
        return True

    def _solve(self, number: int, problem: _Problem) -> None:
        core = problem.core(self._relaxed[number].prices_L, self._bound[number] - self._known)
        self._bound[number] = -np.inf
        # The solver keeps limits to within a tolerance; a choice that is above one by less is looked for again below it.
        for within in (1.0, 1.0 - 2 * _TOLERANCE):
            picks = _solved(core, within, self._gap)
            if picks is None or self._offer(number, problem, picks):
                return

    def _tighten(self, multipliers_L: Array) -> None:
        """Lower every bound by Lagrange's: what exceeds a limit is paid for, so that stages no longer depend on each other."""
        above_S = (self._above_values - self._above_uses @ multipliers_L).max(axis=1)
        lowest_S = (self._lowest_values - self._lowest_uses @ multipliers_L).max(axis=1)
        over = np.concatenate([np.cumsum(above_S[::-1])[::-1][1:], [0.0]])
        self._bound = np.minimum(self._bound, lowest_S + over + multipliers_L.sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Padded:
    """The options of all stages as one table; those that are not there are worth less than nothing."""

    values_SO: Array
    costs_SOC: Array


@lru_cache(16)
def _padded(stages: tuple[Stage, ...]) -> tuple[_Padded, _Padded]:
    """Options above the lowest adapted stage, and of it."""
    return _table([stage.above for stage in stages]), _table([stage.lowest for stage in stages])


def _table(parts: Sequence[StageOptions]) -> _Padded:
    values = np.full((len(parts), max(len(part.values_O) for part in parts)), _NEVER)
    costs = np.zeros((*values.shape, KINDS))
    for number, part in enumerate(parts):
        values[number, : len(part.values_O)], costs[number, : len(part.values_O)] = part.values_O, part.costs_OC
    return _Padded(values, costs)


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """Choose one option of every stage."""

    values_SO: Array
    """Of options that may be chosen; of others less than nothing."""
    uses_SOL: Array
    """As shares of what is free once the lowest stage has its least."""
    free_L: Array
    """Share of every limit that is free."""

    def value(self, picks_S: Picks) -> float:
        """Of these options."""
        return float(self.values_SO[np.arange(len(picks_S)), picks_S].sum())

    def used_L(self, picks_S: Picks) -> Array:
        """By these options."""
        return np.asarray(self.uses_SOL[np.arange(len(picks_S)), picks_S].sum(axis=0))

    def rounded(self, found: Relaxed) -> Picks:
        """Whole options from those that tie in the relaxed problem: all combinations where they are few, else from one to another."""
        picks_KS = found.picks_KS
        picks = picks_KS[0].copy()
        split = [(int(stage), np.unique(picks_KS[:, stage])) for stage in np.flatnonzero((picks_KS != picks_KS[0]).any(axis=0))]
        if math.prod(len(ties) for _, ties in split) > _COMBINATIONS:
            return self._between(picks_KS)
        fixed = np.ones(len(picks), dtype=bool)
        fixed[[stage for stage, _ in split]] = False
        value, used_L = np.zeros(1), self.uses_SOL[fixed, picks[fixed]].sum(axis=0)[None]
        for stage, ties in split:
            value = (value[:, None] + self.values_SO[stage, ties]).ravel()
            used_L = (used_L[:, None, :] + self.uses_SOL[stage, ties]).reshape(-1, 2)
        best = int(np.argmax(np.where(np.all(used_L <= 1.0 + _SLACK, axis=1), value, -np.inf)))
        for stage, ties in reversed(split):
            best, tie = divmod(best, len(ties))
            picks[stage] = ties[tie]
        return picks

    def _between(self, picks_KS: Picks) -> Picks:
        """The best on the ways from one choice to another, stage by stage."""
        best, most, rows = picks_KS[0], -math.inf, np.arange(picks_KS.shape[1])
        for start in picks_KS:
            for end in picks_KS:
                step_L = self.uses_SOL[rows, end] - self.uses_SOL[rows, start]
                used_L = self.used_L(start) + np.vstack([np.zeros(2), np.cumsum(step_L, axis=0)])
                gain = np.cumsum(self.values_SO[rows, end] - self.values_SO[rows, start])
                value = np.where(np.all(used_L <= 1.0 + _SLACK, axis=1), self.value(start) + np.concatenate([[0.0], gain]), -math.inf)
                point = int(np.argmax(value))
                if value[point] > most:
                    best, most = np.where(rows < point, end, start), float(value[point])
        return best

    def filled(self, picks_S: Picks) -> Picks:
        """The same, with what is left of the limits spent on better options, one after the other."""
        picks, rows = picks_S.copy(), np.arange(len(picks_S))
        while True:
            left_L = 1.0 - self.used_L(picks)
            more_SOL = self.uses_SOL - self.uses_SOL[rows, picks][:, None]
            gain_SO = self.values_SO - self.values_SO[rows, picks][:, None]
            gain_SO = np.where(np.all(more_SOL <= left_L, axis=2), gain_SO, 0.0)
            stage, option = divmod(int(np.argmax(gain_SO)), gain_SO.shape[1])
            if gain_SO[stage, option] <= 1e-12:
                return picks
            picks[stage] = option

    def core(self, prices_L: Array, most: float) -> _Problem:
        """Only options that a choice may have which is worth more than the best known: those no more than `most` behind at these prices.

        Source: fixing by reduced costs, as in branch and bound.
        """
        worth = self.values_SO - self.uses_SOL @ prices_L
        behind = worth.max(axis=1, keepdims=True) - worth
        return dataclasses.replace(self, values_SO=np.where(behind <= most * (1 + 1e-9) + 1e-12, self.values_SO, _NEVER))


def _solved(problem: _Problem, within: float, gap: float) -> Picks | None:
    """The option of every stage; None where no choice keeps the limits."""
    stage, option = np.nonzero(problem.values_SO > _NEVER / 2)
    num_stages, num_options = len(problem.values_SO), len(stage)
    one_each = csc_array((np.ones(num_options), (stage, np.arange(num_options))), shape=(num_stages, num_options))
    uses = csc_array(problem.uses_SOL[stage, option].T)
    low, high = np.concatenate([np.ones(num_stages), [-np.inf] * 2]), np.concatenate([np.ones(num_stages), [within] * 2])
    with _silent():
        result = milp(
            -problem.values_SO[stage, option], integrality=np.ones(num_options), bounds=Bounds(0, 1),
            constraints=LinearConstraint(vstack([one_each, uses]).tocsc(), low, high),
            options={"mip_rel_gap": gap, "node_limit": _NODES},
        )  # fmt: skip
    if result.x is None:
        return None
    picks = np.zeros(num_stages, dtype=np.intp)
    picks[stage[result.x > 0.5]] = option[result.x > 0.5]
    return picks


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS writes lines of its own to standard output, where a user's JSON goes."""
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
