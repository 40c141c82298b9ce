"""The search of one edge's plan: place, bits, ranks and batch, under its memory and the round's deadline.

Source: decision 0010. Which blocks are adapted comes first (depth.py). The base runs where, and in the bits in which, ranks are worth
most, less what narrow weights do to gradients and what a host costs. What is left of memory and time goes to rows per micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from atoll.config.schema import PRECISION_BITS, Edge, RunConfig
from atoll.cost.formulas import adapter_parameters
from atoll.cost.memory import OPTIMIZER_BYTES_PER_PARAMETER
from atoll.cost.split_traffic import remote_blocks
from atoll.planner.costs import Costs, costs_of, step_seconds, wire_modes
from atoll.planner.feasibility import Setting
from atoll.planner.fedpipe.depth import LEARNED, top_blocks
from atoll.planner.fedpipe.ranks import GAP, Limit, best_ranks
from atoll.planner.fedpipe.table import Stage, stages_of
from atoll.planner.request import EdgeRequest, WarmUpPlan
from atoll.registry.parts import trait
from atoll.shapes import BaseShapes
from atoll.wire.byte_formulas import WireMode

FIDELITY = {4: 0.913, 8: 0.9994}
"""Cosine between the adapters' gradients on a base of so many bits and on the unquantized one, as measured (decision 0010); of others 1."""
RECOMPUTED = 2 / 3
"""Steps that are done in the same time with gradient checkpointing: a frozen base takes two passes, and then three."""
HOSTED = {"fp32": 1.0, "bf16": 0.99999, "int8": 0.9998}
"""The same against a host, by the codec of what travels: the least of all wire modes, rounded down (benchmarks/host_worth.py)."""
SECOND_MACHINE = 0.999
"""Of places that teach alike, as 8 bits here (0.9994) and a host do, the edge itself is taken."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an edge's base runs, and in how many bits its blocks' projections are kept there."""

    split: bool
    bits: int
    wire_mode: WireMode | None = None
    """How adapters travel to the host. Each is a place of its own: within one, costs are sums over stages."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What suits an edge best."""

    place: Place
    setting: Setting
    accumulate: int
    ranks_worth: float
    """Worth of the ranks, as a share of the most that any ranks to choose from could be worth."""
    left: float
    """What the place leaves of it: narrow weights, or a host."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why nothing fits in one place: the least that it takes, where that is more than there is."""

    place: Place
    memory_bytes: int | None
    """What is missing; None: there is enough."""
    seconds: float | None


class EdgeSearch:
    """Decides for the edges of one fleet; what does not depend on an edge is worked out once."""

    def __init__(
        self, config: RunConfig, shapes: BaseShapes, pool: Sequence[str], importance: Mapping[str, float],
        frozen_delta: Mapping[str, int] = {},
    ) -> None:  # fmt: skip
        self.config, self.shapes, self.pool, self.frozen_delta = config, shapes, tuple(pool), frozen_delta
        # As shares of all of it: scores may be of any size, and a solver has an absolute tolerance.
        whole = math.fsum(importance[name] for name in pool)
        self.importance = {name: importance[name] / whole if whole else 1 / len(pool) for name in pool}
        self.row_tokens = min(config.data.max_length, shapes.max_positions or config.data.max_length)
        self.adapted = top_blocks(shapes, self.pool, config.plan.depth, max(config.plan.ranks), self.row_tokens)
        self._stages: dict[object, tuple[Stage, ...]] = {}
        self._decided: dict[object, Decision | None] = {}
        self._free: dict[object, Decision | None] = {}
        self._costed: dict[object, Costs] = {}
        self._bytes: dict[object, int] = {}
        self._paces: dict[object, float] = {}

    def decide(self, asked: EdgeRequest, known: Decision | None = None) -> Decision | None:
        """What suits this edge best; None where nothing fits. Its mode is not "cloud".

        Where something that it can do is `known`, nothing worse is found, to whatever share the best is looked for.
        """
        # Machines of one kind are decided on once.
        edge = asked.edge
        limits = (edge.memory, edge.process_memory, edge.flops, edge.bandwidth, edge.latency, asked.num_steps, asked.deadline)
        key = (edge.mode, edge.rank, edge.bits, *limits, known and (known.place, known.ranks_worth, self._key(known)))
        if key not in self._decided:
            self._decided[key] = self.best_of(asked, self.places(edge), known)
        return self._decided[key]

    def worth(self, decision: Decision) -> float:
        """Of its ranks, less what narrow weights, recomputation and a host take from it: 1 is the largest ranks on all of an unquantized
        base here."""
        return decision.ranks_worth * self._share(decision.left, decision.setting.gradient_checkpointing)

    def _share(self, left: float, checkpointing: bool) -> float:
        # Where rounds are filled, time that is lost is steps that are lost; worth is lost with them as far as it takes to teach as little.
        return left * RECOMPUTED ** (1 / LEARNED) if checkpointing and self.config.plan.steps == "fill" else left

    def _left(self, edge: Edge, place: Place) -> float:
        """What a place leaves of the worth of ranks."""
        if not place.split:
            return FIDELITY.get(place.bits, 1.0)
        # Bits that run.toml asks for are as good as they were asked to be.
        asked = FIDELITY.get(self._asked_bits(edge), 1.0)  # type: ignore[arg-type]
        return SECOND_MACHINE * min(self.hosted, asked) * self._pace(edge, place) ** (1 / LEARNED)

    @property
    def hosted(self) -> float:
        """Cosine between the adapters' gradients against a host and without one; of a codec that is not ours, the least known."""
        return HOSTED.get(self.config.wire.codec, min(HOSTED.values()))

    def _pace(self, edge: Edge, place: Place) -> float:
        """What a host leaves of the steps of a filled round, at most all: of those that the unquantized base would do here."""
        if self.config.plan.steps != "fill" or edge.flops is None:
            return 1.0
        key = (place, edge.flops, edge.bandwidth, edge.latency, self._ranks(edge))
        if key not in self._paces:
            ranks = dict.fromkeys(self.adapted, max(self._ranks(edge)))
            rows, checkpointing = self._batches()[-1], self._checkpointing()[0]
            here, there = (
                self.costs(Decision(one, self._setting(one, ranks, rows, checkpointing, 0, edge), self._accumulate(rows), 1.0, 1.0))
                for one in (Place(False, place.bits), place)
            )
            self._paces[key] = min(1.0, here.flops / edge.flops / step_seconds(there, edge, self.config.wire))
        return self._paces[key]

    def costs(self, decision: Decision) -> Costs:
        """What it costs."""
        key = self._key(decision)
        if key not in self._costed:
            setting = decision.setting
            self._costed[key] = costs_of(self.config, setting, accumulate=decision.accumulate, wire_mode=decision.place.wire_mode)
        return self._costed[key]

    def _key(self, decision: Decision) -> tuple[object, ...]:
        setting = decision.setting
        sizes = (setting.batch_size, setting.gradient_checkpointing, setting.process_bytes)
        return decision.place, *sizes, tuple(setting.ranks.items())

    def places(self, edge: Edge) -> list[Place]:
        """Where its base may run, the best place first."""
        asked = self._asked_bits(edge)
        widths = sorted(set(self.config.plan.bits), reverse=True) if asked == "auto" else [asked]
        here = [Place(False, bits) for bits in widths if edge.mode in ("auto", "local")]
        # A frozen delta, and a classifier's head, are an edge's own to hold: then no host is offered.
        keeps = trait("aggregation", self.config.federated.aggregation, "keeps_frozen_delta")
        hosts = not keeps and self.config.model.task != "classify"
        splits = edge.mode == "split" or (edge.mode == "auto" and hosts)
        return here + [Place(True, 8 * self._activation_bytes, mode) for mode in wire_modes(self.config.wire)] * splits

    def _asked_bits(self, edge: Edge) -> Literal[16, 8, 4, "auto"]:
        return self.config.model.quantize if edge.bits is None else edge.bits

    @property
    def _activation_bytes(self) -> int:
        return PRECISION_BITS[self.config.model.precision] // 8

    def _ranks(self, edge: Edge) -> tuple[int, ...]:
        return self.config.plan.ranks if edge.rank is None else (edge.rank,)

    def _batches(self) -> list[int]:
        """Rows per micro-batch, the most first; no more than a step has, and where some make that up exactly, only these."""
        rows = self.config.train.batch_size * self.config.train.accumulate
        fitting = {size for size in self.config.plan.batch_sizes if size <= rows}
        exact = {size for size in fitting if rows % size == 0}
        return sorted(exact or fitting or {min(self.config.plan.batch_sizes)}, reverse=True)

    def _batches_to_try(self, asked: EdgeRequest, place: Place) -> list[int]:
        """The fewest rows need the least memory, and ranks come before rows; more are tried only where they save time."""
        fewest, *more = reversed(self._batches())
        tried = [fewest]
        if self._time_limit(asked) is None:
            return tried
        for size in more:
            # Rows come in whole micro-batches, and with a host each micro-batch has its round trips.
            saves_rows = size * self._accumulate(size) < min(one * self._accumulate(one) for one in tried)
            saves_trips = place.split and self._accumulate(size) < self._accumulate(tried[-1])
            tried += [size] if saves_rows or saves_trips else []
        return tried

    def _checkpointing(self) -> list[bool]:
        asked = self.config.train.gradient_checkpointing
        return [False, True] if asked == "auto" else [asked]

    def _accumulate(self, batch_size: int) -> int:
        return -(-self.config.train.batch_size * self.config.train.accumulate // batch_size)

    def _setting(
        self, place: Place, ranks: Mapping[str, int], batch_size: int, checkpointing: bool, process_bytes: int | None,
        edge: Edge | None = None,
    ) -> Setting:
        """What decides memory, for these ranks; of an edge or, where ranks are none, of any."""
        there = remote_blocks(self.config, self.shapes) if place.split else range(0)
        merged = self.pool if self.config.select.merges else ()
        return Setting(
            self.shapes, ranks, place.bits, batch_size, self.row_tokens, checkpointing, there, merged,
            process_bytes, self._activation_bytes, self.frozen_delta, edge is None or edge.process_memory is None,
        )  # fmt: skip

    def _process_bytes(self, edge: Edge, place: Place) -> int:
        """What is there before a model."""
        if edge.process_memory is not None:
            return edge.process_memory
        if (place, "process") not in self._bytes:
            self._bytes[place, "process"] = self._setting(place, {}, 1, False, None).memory.process_bytes
        return self._bytes[place, "process"]

    def _loading_bytes(self, place: Place) -> int:
        """The peak before anything is trained, less the process."""
        if (place, "loading") not in self._bytes:
            self._bytes[place, "loading"] = self._setting(place, {}, 1, False, 0).memory.at_loading_bytes
        return self._bytes[place, "loading"]

    def _peak_bytes(self, edge: Edge, place: Place, ranks: Mapping[str, int], batch_size: int, checkpointing: bool) -> int:
        key = (place, batch_size, checkpointing, tuple(ranks.items()), edge.process_memory is None)
        if key not in self._bytes:
            self._bytes[key] = self._setting(place, ranks, batch_size, checkpointing, 0, edge).peak_bytes
        return self._process_bytes(edge, place) + self._bytes[key]

    def warm_up(self, edge: Edge, place: Place) -> WarmUpPlan | None:
        """The widest warm-up that fits the edge's memory; None where none does, or none is asked for."""
        plan = self.config.plan
        if not plan.warms_up:
            return None
        # What was trained before is held still beside what warms up.
        before = max(self._ranks(edge)) if plan.refresh is not None or self.config.adapter.start is not None else 0
        ranks = dict.fromkeys(self.pool, plan.warmup_rank + before)
        # P, l and Q are held beside the pair that they are written into, and have moments of their own.
        twice = OPTIMIZER_BYTES_PER_PARAMETER * adapter_parameters(self.shapes, dict.fromkeys(self.pool, plan.warmup_rank))
        for checkpointing in self._checkpointing():
            for batch_size in self._batches():
                if edge.memory is None or self._peak_bytes(edge, place, ranks, batch_size, checkpointing) + twice <= edge.memory:
                    return WarmUpPlan(batch_size, checkpointing)
        return None

    def shortage(self, asked: EdgeRequest, place: Place) -> Shortage:
        """What is missing for the least that this place takes: one adapter, one micro-batch of the fewest rows."""
        edge = asked.edge
        sizes = [(size, checkpointing) for size in self._batches_to_try(asked, place) for checkpointing in self._checkpointing()]
        costs_NC = np.concatenate([stage.lowest.costs_OC for size in sizes for stage in self._table(edge, place, *size)])
        missing_bytes = missing_seconds = 0.0
        if edge.memory is not None:
            least = max(float(costs_NC[:, 0].min()), self._loading_bytes(place))
            missing_bytes = self._process_bytes(edge, place) + least - edge.memory
        time = self._time_limit(asked)
        if time is not None:
            missing_seconds = float((costs_NC @ np.array(time.weights)).min()) - time.most
        return Shortage(place, math.ceil(missing_bytes) if missing_bytes > 0 else None, missing_seconds if missing_seconds > 0 else None)

    def _table(self, edge: Edge, place: Place, batch_size: int, checkpointing: bool) -> tuple[Stage, ...]:
        """Costs less those of the process, which edges may declare."""

        def costs(ranks: Mapping[str, int]) -> Costs:
            setting = self._setting(place, ranks, batch_size, checkpointing, 0, edge)
            return costs_of(self.config, setting, accumulate=self._accumulate(batch_size), wire_mode=place.wire_mode)

        key = (place, batch_size, checkpointing, self._ranks(edge), edge.process_memory is None)
        if key not in self._stages:
            there = remote_blocks(self.config, self.shapes) if place.split else range(0)
            borders = (there.start, there.stop)
            self._stages[key] = stages_of(self.shapes, self.adapted, self._ranks(edge), self.importance, costs, borders)
        return self._stages[key]

    def best_of(self, asked: EdgeRequest, places: Sequence[Place], known: Decision | None = None) -> Decision | None:
        """The place and ranks of most worth; for these no checkpointing where that fits, and the most rows per micro-batch."""
        best = known if known is not None and known.place in places else None
        hosts = [place for place in places if place.split]
        if self._time_limit(asked) is None:  # Then all of them allow the same.
            hosts = [max(hosts, key=lambda place: self._left(asked.edge, place))] if hosts else []
        for place in [*(place for place in places if not place.split), *hosts]:
            for checkpointing in self._checkpointing():
                for batch_size in self._batches_to_try(asked, place):
                    best = self._better(asked, place, batch_size, checkpointing, best) or best
        if best is None or not best.place.split:
            return best and self._widest(asked, best)
        alike = [self._in_mode(asked, best, place) for place in places if place.split]
        as_good = [one for one in alike if one is not None and self.worth(one) >= self.worth(best) * (1 - 1e-12)]
        return min(as_good, key=lambda one: self.wire_rank(asked.edge, one))

    def wire_rank(self, edge: Edge, decision: Decision) -> tuple[float, int]:
        """By which of equal worth the quicker is taken: seconds and bytes of a step."""
        costs = self.costs(decision)
        return step_seconds(costs, edge, self.config.wire), costs.up_bytes + costs.down_bytes

    def _in_mode(self, asked: EdgeRequest, one: Decision, place: Place) -> Decision | None:
        """The same in another wire mode, with the most rows; None where that is late."""
        other = dataclasses.replace(one, place=place, left=self._left(asked.edge, place))
        return self._widest(asked, other) if place == one.place or self._keeps_deadline(asked, other) else None

    def _better(self, asked: EdgeRequest, place: Place, batch_size: int, checkpointing: bool, best: Decision | None) -> Decision | None:
        """What is worth more than the best so far; None where nothing is."""
        edge, left = asked.edge, self._left(asked.edge, place)
        share = self._share(left, checkpointing)
        worth = self.worth(best) / share if best is not None else 0.0
        if worth >= 1.0:
            return None
        # What time alone allows is the most that can be had; where it fits in memory, nothing is left to look for.
        most = self._without_memory(asked, place, batch_size)
        if most is None or most.ranks_worth <= worth:
            return None
        most = dataclasses.replace(most, left=left)
        if checkpointing == most.setting.gradient_checkpointing and self._fits(edge, place, most.setting.ranks, batch_size, checkpointing):
            return dataclasses.replace(most, setting=dataclasses.replace(most.setting, process_bytes=edge.process_memory))
        if edge.memory is None:
            return None
        free = edge.memory - self._process_bytes(edge, place)
        if self._loading_bytes(place) > free:
            return None
        # An optimum is found to within a share of it.
        within = (worth, most.ranks_worth * (1 + GAP))
        # Memory is rounded to bytes, and a sum of rounded parts may be some too low: then they are kept free.
        for spare in (0, 4 * len(self.pool)):
            found = self._solved(asked, place, batch_size, checkpointing, [Limit((1, 0, 0, 0, 0, 0), free - spare)], within)
            if found is None or self._fits(edge, place, found.setting.ranks, batch_size, checkpointing):
                return found
        return None

    def _without_memory(self, asked: EdgeRequest, place: Place, batch_size: int) -> Decision | None:
        """The best where memory is no limit, which no recomputation betters."""
        edge = asked.edge
        limits = (edge.flops, edge.bandwidth, edge.latency, asked.num_steps, asked.deadline)
        key = (place, batch_size, self._ranks(edge), edge.process_memory is None, limits if self._time_limit(asked) is not None else None)
        if key not in self._free:
            self._free[key] = self._solved(asked, place, batch_size, self._checkpointing()[0], [], (0.0, math.inf))
        return self._free[key]

    def _solved(
        self, asked: EdgeRequest, place: Place, batch_size: int, checkpointing: bool, memory: Sequence[Limit], within: tuple[float, float]
    ) -> Decision | None:
        edge, time = asked.edge, self._time_limit(asked)
        if time is not None and time.most <= 0:
            return None
        most = math.log1p(max(self._ranks(edge)))
        table = self._table(edge, place, batch_size, checkpointing)
        limits = [*memory, *([] if time is None else [time])]
        chosen = best_ranks(table, limits, better_than=within[0] * most, at_most=within[1] * most)
        if chosen is None:
            return None
        setting = self._setting(place, chosen.ranks, batch_size, checkpointing, edge.process_memory, edge)
        return Decision(place, setting, self._accumulate(batch_size), chosen.objective / most, self._left(edge, place))

    def _widest(self, asked: EdgeRequest, best: Decision) -> Decision:
        """The same ranks, without checkpointing if that can be, and with the most rows that memory holds in time."""
        fewest_first = self._batches()[::-1]
        for checkpointing in self._checkpointing():
            # More rows take more memory.
            num_fitting = bisect_left(
                fewest_first, True,
                key=lambda size: not self._fits(asked.edge, best.place, best.setting.ranks, size, checkpointing),
            )  # fmt: skip
            for batch_size in fewest_first[:num_fitting][::-1]:
                setting = dataclasses.replace(best.setting, batch_size=batch_size, gradient_checkpointing=checkpointing)
                one = dataclasses.replace(best, setting=setting, accumulate=self._accumulate(batch_size))
                if self._in_time(asked, one, best):
                    return one
        return best

    def _fits(self, edge: Edge, place: Place, ranks: Mapping[str, int], batch_size: int, checkpointing: bool) -> bool:
        return edge.memory is None or self._peak_bytes(edge, place, ranks, batch_size, checkpointing) <= edge.memory

    def _in_time(self, asked: EdgeRequest, one: Decision, known: Decision) -> bool:
        """Whether it keeps the deadline, as the known one with the same ranks does."""
        rows, known_rows = (it.setting.batch_size * it.accumulate for it in (one, known))
        recomputes = one.setting.gradient_checkpointing > known.setting.gradient_checkpointing
        if self._time_limit(asked) is None or (rows <= known_rows and one.accumulate <= known.accumulate and not recomputes):
            return True
        return self._keeps_deadline(asked, one)

    def _keeps_deadline(self, asked: EdgeRequest, one: Decision) -> bool:
        seconds = self.costs(one).round_seconds(asked.edge, asked.num_steps)
        return seconds is None or asked.deadline is None or seconds <= asked.deadline * (1 + 1e-12)

    def _time_limit(self, asked: EdgeRequest) -> Limit | None:
        """The round's time, as a sum over costs; None where there is no deadline, or the edge declares neither speed nor link."""
        edge, deadline, steps = asked.edge, asked.deadline, asked.num_steps
        if deadline is None or not asked.is_timed:
            return None
        by_bit, by_flop, trip = 8 / (edge.bandwidth or math.inf), 1 / (edge.flops or math.inf), 2 * (edge.latency or 0.0)
        there = 1 / (self.config.wire.host_flops or math.inf)
        return Limit((0, 2 * by_bit, steps * by_flop, steps * by_bit, steps * trip, steps * there), deadline - trip)
