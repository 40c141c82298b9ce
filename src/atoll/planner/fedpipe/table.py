"""What every choice of ranks costs on an edge, taken apart: costs are sums over stages, once the lowest adapted stage is known.

The formulas stay where they are: the parts are found by asking a function for the costs of a few choices. That they add up is tested.
Blocks of equal sizes in the same part of the base are alike: a stage costs the same in each, and what lies above a lowest stage costs the
same more for each block further down. Four of them are asked about; where these do not agree, all are.
Array suffixes: S stages, O options of a stage, C kinds of cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from atoll.planner.costs import Costs
from atoll.shapes import BaseShapes, ModuleShape

Array = NDArray[np.float64]
KINDS = 6
"""Of cost: memory, bytes of a round without steps (the mean of both ways), FLOPs, bytes and round trips of a step, and
its FLOPs in the host."""


CostsOf = Callable[[Mapping[str, int]], Costs]
"""Costs of ranks by full module name; modules that are absent have none."""


@dataclass(frozen=True, slots=True, eq=False)
class StageOptions:
    """Choices of ranks for the modules of a stage: those that no other beats in value and in every cost."""

    ranks: tuple[tuple[int, ...], ...]
    """By option, one for each module of the stage."""
    values_O: Array
    costs_OC: Array


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Modules of one block that read the same input."""

    modules: tuple[ModuleShape, ...]
    above: StageOptions
    """Where a stage below it is adapted; the first option is no adapter at all, and costs nothing."""
    lowest: StageOptions
    """Where it is the lowest adapted stage; costs include all that any adapter there brings about."""


def stages_of(
    shapes: BaseShapes, pool: Sequence[str], ranks: Sequence[int], importance: Mapping[str, float], costs_of: CostsOf,
    borders: Sequence[int] = (),
) -> tuple[Stage, ...]:  # fmt: skip
    """The stages of a pool of modules from the bottom to the top, each with its options.

    `importance` has every module of the pool; an adapter of rank r is worth importance * log(1 + r). `ranks` are those to choose from.
    At `borders`, blocks from 0, another part of the base begins, as where some run in a host.
    """
    groups: dict[tuple[int, int], list[ModuleShape]] = {}
    wanted = set(pool)
    for module in shapes.modules:
        if module.name in wanted:
            groups.setdefault((module.block, module.stage), []).append(module)
    ordered = [tuple(groups[place]) for place in sorted(groups)]
    parts = _Parts(costs_of, ordered, _like_places(shapes, ordered, borders))
    known: dict[object, _Combinations] = {}

    def options(number: int, costs: _Linear, once_C: Array, *, or_none: bool) -> StageOptions:
        key = (id(costs), or_none)
        if key not in known:
            known[key] = _combinations(ranks, costs, or_none=or_none)
        return _options([importance[module.name] for module in ordered[number]], known[key], once_C)

    stages = []
    for number, modules in enumerate(ordered):
        above = options(number, parts.above(number), np.zeros(KINDS), or_none=True) if number else None
        like, once_C = parts.lowest(number)
        nothing = StageOptions(((0,) * len(modules),), np.zeros(1), np.zeros((1, KINDS)))
        stages.append(Stage(modules, above or nothing, options(number, like, once_C, or_none=False)))
    return tuple(stages)


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    """Costs of a stage's adapters: once for any, for each module, and for each rank of it."""

    any_C: Array
    module_C: tuple[Array, ...]
    rank_C: tuple[Array, ...]

    def of(self, ranks: Sequence[int]) -> Array:
        """Costs of these ranks, of which at least one is not 0."""
        total = self.any_C.copy()
        for rank, module, slope in zip(ranks, self.module_C, self.rank_C, strict=True):
            total += (module + rank * slope) if rank else 0.0
        return total


class _Parts:
    """Finds the parts by differences. Stages of equal sizes in like places cost the same, and few of them are asked about."""

    def __init__(self, costs_of: CostsOf, stages: Sequence[tuple[ModuleShape, ...]], places: Sequence[object]) -> None:
        self._stages = stages
        self._costs_of = costs_of
        self._anchor = {stages[0][0].name: 1} if stages else {}
        self._alone = self._ask(self._anchor)
        self._known: dict[object, _Linear] = {}
        # Above the first stage, what is asked about is that stage too.
        self._once_above = self._in_like_places(places, 1, lambda modules: self._ask({**self._anchor, modules[0].name: 1}) - self._alone)
        self._once_lowest = self._in_like_places(places, 0, lambda modules: self._ask({modules[0].name: 1}))

    def _ask(self, ranks: Mapping[str, int]) -> Array:
        costs = self._costs_of(ranks)
        without_steps = (costs.round_up_bytes(0) + costs.round_down_bytes(0) + costs.wrapping_bytes) / 2
        wire_bytes = costs.up_bytes + costs.down_bytes
        return np.array([
            costs.memory_bytes, without_steps, costs.flops, wire_bytes, costs.round_trips, costs.host_flops,
        ], dtype=float)  # fmt: skip

    def _in_like_places(
        self, places: Sequence[object], first: int, ask: Callable[[tuple[ModuleShape, ...]], Array]
    ) -> dict[int, Array]:
        """The answer for every stage from the first on; between those of a like place, on a straight line if some that are asked are."""
        alike: dict[object, list[int]] = {}
        for number in range(first, len(self._stages)):
            alike.setdefault(places[number], []).append(number)
        found: dict[int, Array] = {}
        for numbers in alike.values():
            low, high = numbers[0], numbers[-1]
            blocks = {number: self._stages[number][0].block for number in numbers}
            asked = sorted({low, numbers[len(numbers) // 3], numbers[2 * len(numbers) // 3], high})
            answers = {number: ask(self._stages[number]) for number in asked}
            slope = (answers[high] - answers[low]) / max(1, blocks[high] - blocks[low])
            line = {number: answers[low] + slope * (blocks[number] - blocks[low]) for number in numbers}
            straight = all(_equal(line[number], answer) for number, answer in answers.items())
            found |= line | answers if straight else {number: ask(self._stages[number]) for number in numbers}
        return found

    def above(self, number: int) -> _Linear:
        """Of a stage that is not the first, where the first is adapted as well."""
        modules = self._stages[number]
        # Memory is rounded, and may differ by a byte between stages that are alike.
        return self._linear(("above", *_sizes(modules), *self._once_above[number][1:]), modules, self._anchor, self._alone)

    def lowest(self, number: int) -> tuple[_Linear, Array]:
        """Of a stage below which nothing is adapted, as of any like it; and what this one costs more."""
        modules, once = self._stages[number], self._once_lowest[number]
        # What lies below and above differs from stage to stage, and is a constant: the rest is that of any stage like it.
        like = self._linear(("lowest", id(self.above(number)) if number else None), modules, {}, np.zeros(KINDS))
        return like, once - like.of((1,) + (0,) * (len(modules) - 1))

    def _linear(self, key: object, modules: tuple[ModuleShape, ...], with_: Mapping[str, int], without_C: Array) -> _Linear:
        if key not in self._known:
            self._known[key] = self._asked(modules, with_, without_C)
        return self._known[key]

    def _asked(self, modules: tuple[ModuleShape, ...], with_: Mapping[str, int], without_C: Array) -> _Linear:
        first = [self._ask({**with_, module.name: 1}) - without_C for module in modules]
        slopes = tuple(self._ask({**with_, module.name: 2}) - without_C - one for module, one in zip(modules, first, strict=True))
        if len(modules) == 1:
            return _Linear(first[0] - slopes[0], (np.zeros(KINDS),), slopes)
        # What two modules share is in both of their costs, and once in that of the two together.
        pair = self._ask({**with_, modules[0].name: 1, modules[1].name: 1}) - without_C
        shared = first[0] + first[1] - pair
        return _Linear(shared, tuple(one - slope - shared for one, slope in zip(first, slopes, strict=True)), slopes)


def _like_places(shapes: BaseShapes, stages: Sequence[tuple[ModuleShape, ...]], borders: Sequence[int]) -> list[object]:
    """Of every stage, what it has in common with those that cost alike: a run of equal blocks, its place in the block, its modules."""
    # The frozen delta is on the modules of the pool alone.
    pool = {module.name for modules in stages for module in modules}
    sizes: list[list[tuple[int, int, int, bool]]] = [[] for _ in range(shapes.num_blocks)]
    for module in shapes.modules:
        sizes[module.block].append((module.stage, module.d_in, module.d_out, module.name in pool))
    begins = [block in borders or not block or sizes[block] != sizes[block - 1] for block in range(shapes.num_blocks)]
    run = np.cumsum(begins).tolist()
    return [(run[modules[0].block], modules[0].stage, _sizes(modules)) for modules in stages]


def _equal(one_C: Array, other_C: Array) -> bool:
    return bool(abs(one_C[0] - other_C[0]) <= 2.0 and np.allclose(one_C[1:], other_C[1:], rtol=1e-12, atol=0.0))


def _sizes(modules: Sequence[ModuleShape]) -> tuple[tuple[int, int], ...]:
    return tuple((module.d_in, module.d_out) for module in modules)


@dataclass(frozen=True, slots=True, eq=False)
class _Combinations:
    """All choices of ranks for the modules of a stage, with what they cost beside each other."""

    ranks_OM: NDArray[np.intp]
    costs_OC: Array
    no_dearer_OO: NDArray[np.bool_]
    """Whether the one costs no more of anything than the other."""
    before_OO: NDArray[np.bool_]
    """The same, and of two that cost the same it is the first."""


def _combinations(ranks: Sequence[int], costs: _Linear, *, or_none: bool) -> _Combinations:
    steps = (0, *ranks)
    ranks_OM = np.array(list(product(steps, repeat=len(costs.module_C))), dtype=np.intp)[0 if or_none else 1 :]
    costs_OC = np.stack([costs.of(choice) if any(choice) else np.zeros(KINDS) for choice in ranks_OM.tolist()])
    no_dearer = np.all(costs_OC[:, None] <= costs_OC, axis=2)
    return _Combinations(ranks_OM, costs_OC, no_dearer, no_dearer & (~no_dearer.T | np.tri(len(ranks_OM), k=-1, dtype=bool).T))


def _options(worth: Sequence[float], choices: _Combinations, once_C: Array) -> StageOptions:
    """Those that no other beats."""
    values_O = np.log1p(choices.ranks_OM) @ np.array(worth)
    beaten = (choices.no_dearer_OO & (values_O[:, None] > values_O)) | (choices.before_OO & (values_O[:, None] == values_O))
    kept = np.flatnonzero(~beaten.any(axis=0))
    return StageOptions(tuple(map(tuple, choices.ranks_OM[kept].tolist())), values_O[kept], choices.costs_OC[kept] + once_C)
