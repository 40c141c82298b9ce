"""The modules with the highest summed score whose exchange stays within a share of the full pool's bytes: exact, not greedy.

What a module costs depends on the others. Modules of one place share x and dx; the lowest active place returns no dx, unless a module in
front of the host's blocks is active, and then every such module costs the same one gradient; modules behind them cost nothing. So the
places are taken from the last to the first with every dx counted, as in a knapsack, and each place in turn is tried as the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from atoll.selection.pool import PoolModule
from atoll.wire.byte_formulas import ModuleSizes, WireMode, encoded_bytes, split_bytes


@dataclass(frozen=True, slots=True)
class Exchange:
    """One training exchange, but for which modules are active."""

    d_model: int
    num_tokens: int
    num_wanted: int
    """Tokens whose final hidden state crosses."""
    codec: str
    mode: WireMode
    adapter_codec: str = "fp32"
    """Of lent adapters."""

    def num_bytes(self, active: Iterable[PoolModule]) -> int:
        """Tensor bytes, both ways, with these modules active; what several modules read is sent once, factors are counted once."""
        groups: dict[tuple[int, int], list[ModuleSizes]] = {}
        front = False
        for module in active:
            front |= module.front
            if module.remote:
                groups.setdefault(module.place, []).append(module.size)
        return sum(split_bytes(
            [groups[place] for place in sorted(groups)], self.d_model, self.num_tokens, self.num_wanted, self.codec, self.mode,
            shared=True, lowest_needs_input_gradient=front, front_gradient=front, has_factors=self.mode != "dense",
            adapter_codec=self.adapter_codec,
        ))  # fmt: skip


def best_within(pool: Sequence[PoolModule], scores: Sequence[float], exchange: Exchange, budget: float) -> frozenset[int]:
    """Positions in the pool of the modules to keep, for scores of zero or more; at least one.

    Where several sets score the same, one with the fewest bytes; modules that cost nothing more come along. Where not even one module
    is within the budget: of those that cost least, the one with the highest score, or the first of several such.
    """
    # The share as it is written: 0.29 of 100 bytes are 29.
    limit = math.floor(Fraction(repr(budget)) * exchange.num_bytes(pool))
    alone = [exchange.num_bytes([module]) for module in pool]
    least = min(alone)
    if least > limit:
        return frozenset({max((i for i in range(len(pool)) if alone[i] == least), key=lambda i: scores[i])})
    found = max(_candidates(pool, scores, exchange, alone, limit), key=lambda candidate: (candidate.score, -candidate.num_bytes))
    return frozenset(found.members)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A set of modules, its summed score, and what it adds to the transfers that do not depend on the choice (h, hidden, g)."""

    score: float
    num_bytes: int
    members: tuple[int, ...]


def _candidates(
    pool: Sequence[PoolModule], scores: Sequence[float], exchange: Exchange, alone: Sequence[int], limit: int
) -> Iterator[_Candidate]:
    """The best set for each lowest place, the best with the front and that of the back alone, as far as they are within the limit."""
    front = tuple(i for i, module in enumerate(pool) if module.front)
    back = tuple(i for i, module in enumerate(pool) if not (module.front or module.remote))
    # g, the gradient of the final hidden state, goes up as soon as anything but the back is active.
    g_bytes = encoded_bytes((exchange.num_wanted, exchange.d_model), exchange.codec)
    fixed_bytes = exchange.num_bytes(()) + g_bytes
    if back:
        yield _Candidate(0.0, -g_bytes, back)
    table, spare_bytes = _Table(), limit - fixed_bytes
    for place in sorted({module.place for module in pool if module.remote}, reverse=True):
        modules = [i for i, module in enumerate(pool) if module.place == place]
        lends = exchange.mode == "lent"  # Then nothing crosses at a place.
        x_bytes = 0 if lends else encoded_bytes((exchange.num_tokens, pool[modules[0]].size[0]), exchange.codec)
        options = _options({i: alone[i] - fixed_bytes - x_bytes for i in modules}, x_bytes, scores)
        yield from (table.best(spare_bytes, option, back) for option in options if option.num_bytes <= spare_bytes)
        # dx is as large as x.
        table.extend([_Candidate(option.score, option.num_bytes + x_bytes, option.members) for option in options], spare_bytes)
    if front and alone[front[0]] <= limit:
        together = _Candidate(math.fsum(scores[i] for i in front), alone[front[0]] - fixed_bytes, front)
        yield table.best(spare_bytes, together, back)


def _options(module_bytes: Mapping[int, int], x_bytes: int, scores: Sequence[float]) -> list[_Candidate]:
    """The sets of one place's modules that are worth having, without dx: of modules that cost the same, those with the highest scores."""
    options = [_Candidate(0.0, x_bytes, ())]
    for size in sorted(set(module_bytes.values())):
        same = sorted((i for i in module_bytes if module_bytes[i] == size), key=lambda i: (-scores[i], i))
        options = [
            _Candidate(o.score + math.fsum(scores[i] for i in same[:count]), o.num_bytes + count * size, (*o.members, *same[:count]))
            for o in options
            for count in range(len(same) + 1)
        ]
    best: list[_Candidate] = []
    for option in sorted(options, key=lambda option: (option.num_bytes, -option.score)):
        if option.members and (not best or option.score > best[-1].score):
            best.append(option)
    return best


class _Table:
    """The knapsack over the places so far: for every sum of bytes that is worth it, the highest score, and how it came about."""

    def __init__(self) -> None:
        self._bytes: NDArray[np.int64] = np.zeros(1, np.int64)
        self._score: NDArray[np.float64] = np.zeros(1)
        self._levels: list[tuple[list[_Candidate], NDArray[np.intp]]] = []

    def best(self, limit: int, added: _Candidate, free: tuple[int, ...]) -> _Candidate:
        """The best set of the table that fits under the limit together with what is added."""
        row = int(np.searchsorted(self._bytes, limit - added.num_bytes, side="right")) - 1
        score, num_bytes = float(self._score[row]) + added.score, int(self._bytes[row]) + added.num_bytes
        return _Candidate(score, num_bytes, (*added.members, *self._members(row), *free))

    def extend(self, options: Sequence[_Candidate], limit: int) -> None:
        """Take one more place in, with at most one of its options."""
        options = [_Candidate(0.0, 0, ()), *options]
        all_bytes = np.add.outer(self._bytes, np.array([option.num_bytes for option in options])).ravel()
        all_scores = np.add.outer(self._score, np.array([option.score for option in options])).ravel()
        fits = np.flatnonzero(all_bytes <= max(limit, 0))
        order = fits[np.lexsort((-all_scores[fits], all_bytes[fits]))]
        # Worth it: a higher score than everything that is cheaper.
        before = np.maximum.accumulate(all_scores[order])[:-1]
        kept = order[np.concatenate(([True], all_scores[order][1:] > before))]
        self._bytes, self._score = all_bytes[kept], all_scores[kept]
        self._levels.append((options, kept))

    def _members(self, row: int) -> tuple[int, ...]:
        members: tuple[int, ...] = ()
        for options, kept in reversed(self._levels):
            row, number = divmod(int(kept[row]), len(options))
            members += options[number].members
        return members
