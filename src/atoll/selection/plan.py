"""What every edge is going to do, decided from configuration and shapes alone: scores and sizes in, a plan out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from atoll.adapters.targets import resolve_targets
from atoll.config.schema import DEFAULT_LOCAL_STEPS, PRECISION_BITS, Edge, RunConfig
from atoll.cost.formulas import adapter_parameters
from atoll.errors import InfeasibleError
from atoll.selection.costs import Costs, costs_of
from atoll.selection.fit import Setting, advice, largest_batch, needs, refuse
from atoll.selection.growth import Growth, growth_after, growths_of
from atoll.selection.importance import Importance, by_type, uniform
from atoll.selection.planner.explain import Binding, Price, binding, missing, prices, why
from atoll.selection.planner.fedpipe import Asked, Decision, Planner, WarmUpPlan
from atoll.selection.split import elsewhere
from atoll.shapes import BaseShapes
from atoll.units import format_bytes, format_seconds

LOCAL_EDGE = "local"
"""The one edge of a run without [[edge]]."""
Mode = Literal["local", "split", "cloud"]


@dataclass(frozen=True, slots=True)
class EdgePlan:
    """What one edge does in every round."""

    name: str
    mode: Mode
    bits: int
    """Bits per weight in the blocks of its copy of the base."""
    batch_size: int
    accumulate: int
    ranks: Mapping[str, int]
    """Rank by full module name."""
    num_steps: int
    """Optimizer steps per round."""
    gradient_checkpointing: bool
    predicted_peak_bytes: int
    predicted_seconds: float | None
    """Per round, with every row at full length and every token a label: an upper bound. None where no speed or link is declared."""
    up_bytes: int
    """Per round, with every module active; rows that an edge hands over are not counted."""
    down_bytes: int
    """Per round."""
    binding: Binding
    """The declared limits that decided something, if any did."""
    why: str
    objective: float | None = None
    """Worth of its ranks, as a share of the largest on all weights; None where run.toml says the ranks."""
    prices: tuple[Price, ...] = ()
    """What more of a limit would buy."""
    under_training: float = 0.0
    """Share of a round's steps that it cannot finish by the deadline, by declared speed and link."""
    warm_up: WarmUpPlan | None = None
    """How it finds the importance of weights; None where it is not asked to, or has too little memory for it."""

    def to_json(self) -> dict[str, object]:
        """The fields as JSON values."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        nested = {"prices": [dataclasses.asdict(price) for price in self.prices]}
        nested["warm_up"] = None if self.warm_up is None else dataclasses.asdict(self.warm_up)  # type: ignore[assignment]
        return found | {"ranks": dict(self.ranks)} | nested


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An edge for which nothing fits, in a run that goes on without it."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What all edges do, and how often."""

    edges: tuple[EdgePlan, ...]
    rounds: int
    num_trainable: int
    """Numbers in the adapter that the edges share, at the largest rank of each module."""
    num_parameters: int
    """Of the frozen base."""
    left_out: tuple[LeftOut, ...] = ()
    importance: str | None = None
    """How the worth of weights was found; None where run.toml says the ranks."""
    pool: tuple[str, ...] = ()
    """Full names of all modules that may have an adapter."""

    def edge(self, name: str) -> EdgePlan:
        """The plan of one edge, which must exist."""
        return next(edge for edge in self.edges if edge.name == name)

    @property
    def predicted_seconds(self) -> float | None:
        """Of the whole run: a round lasts as long as its slowest edge. None where an edge declares neither speed nor link."""
        known = [edge.predicted_seconds for edge in self.edges if edge.predicted_seconds is not None]
        return self.rounds * max(known) if len(known) == len(self.edges) else None

    def to_json(self) -> dict[str, object]:
        """The fields as JSON values."""
        return {
            "rounds": self.rounds,
            "num_parameters": self.num_parameters,
            "num_trainable": self.num_trainable,
            "predicted_seconds": self.predicted_seconds,
            "up_bytes": self.rounds * sum(edge.up_bytes for edge in self.edges),
            "down_bytes": self.rounds * sum(edge.down_bytes for edge in self.edges),
            "importance": self.importance,
            "edges": [edge.to_json() for edge in self.edges],
            "left_out": [dataclasses.asdict(edge) for edge in self.left_out],
        }


def plan_fleet(
    config: RunConfig, shapes: BaseShapes, edges_rows: Mapping[str, int] | None, *, start_ranks: Mapping[str, int] | None = None,
    has_host: bool = False, importance: Importance | None = None, rounds_done: int = 0,
) -> FleetPlan:  # fmt: skip
    """The plan of every edge, in the order of the configuration. With a host, mode = "auto" means split, unless a planner decides.

    `edges_rows` counts each edge's rows and is needed for local_epochs only; `start_ranks` are those of [adapter] start, which hold for
    all edges but those that name a rank of their own. Without `importance` a planner takes all weights for equal. `rounds_done` decides
    the stage where adapters grow (policy = "fedadapter").

    Raises: TargetError; InfeasibleError naming every edge for which nothing fits, with what is missing and what would fit.
    """
    names = tuple(start_ranks) if start_ranks is not None else resolve_targets(config.adapter.targets, shapes.modules)
    if config.adapter.kind == "full":
        widths = {module.name: min(module.d_in, module.d_out) for module in shapes.modules}
        start_ranks = {name: widths[name] for name in names}
    plans_itself = config.plan.policy == "fedpipe"
    edges = config.edge or (Edge(name=LOCAL_EDGE),)
    edges = tuple(_placed(edge, config.run.placement, has_host, plans_itself=plans_itself) for edge in edges)
    steps = [steps_per_round(config, edges_rows[edge.name] if edges_rows is not None else None) for edge in edges]
    asked = [Asked(edge, num_steps, config.plan.round_deadline) for edge, num_steps in zip(edges, steps, strict=True)]
    if plans_itself:
        plans, left_out = _planned(Planner(config, shapes, names, _worth(config, names, importance)), asked)
    elif config.plan.policy == "fedadapter":
        plans, left_out = _growing(config, shapes, asked, names, rounds_done)
    else:
        plans, left_out = _as_written(config, shapes, asked, names, start_ranks)
    largest = {name: max((plan.ranks.get(name, 0) for plan in plans), default=0) for name in names}
    kind = None if not plans_itself else "none" if importance is None else importance.kind
    trained = adapter_parameters(shapes, largest)
    return FleetPlan(tuple(plans), config.run.rounds, trained, shapes.num_parameters, tuple(left_out), kind, tuple(names))


def _worth(config: RunConfig, names: Sequence[str], importance: Importance | None) -> Mapping[str, float]:
    if importance is None:
        return uniform(names)
    scores = importance.of(names, "importance")
    return by_type(scores) if config.plan.granularity == "type" else scores


def steps_per_round(config: RunConfig, num_rows: int | None) -> int:
    """Optimizer steps of one edge in one round: local_steps, or local_epochs over its rows, at least one."""
    if config.train.local_epochs is None:
        return config.train.local_steps or DEFAULT_LOCAL_STEPS
    assert num_rows is not None, "local_epochs needs the edge's number of rows"
    return max(1, math.ceil(config.train.local_epochs * num_rows / (config.train.batch_size * config.train.accumulate)))


def _placed(edge: Edge, placement: Literal["auto"] | Mode, has_host: bool, *, plans_itself: bool) -> Edge:
    """The edge with a mode that is not "auto", unless a planner finds it; of one that trains nothing itself, no limit counts."""
    asked = placement if edge.mode == "auto" else edge.mode
    by_itself: Literal["auto", "split", "local"] = "auto" if plans_itself else "split" if has_host else "local"
    mode = by_itself if asked == "auto" else asked
    limits = {"memory": None, "flops": None, "bandwidth": None, "latency": None} if mode == "cloud" else {}
    return edge.model_copy(update={"mode": mode, **limits})


def _rank(config: RunConfig, edge: Edge, name: str, start_ranks: Mapping[str, int] | None) -> int:
    if edge.rank is not None:
        return edge.rank
    return config.adapter.rank if start_ranks is None else start_ranks[name]


def _as_written(
    config: RunConfig, shapes: BaseShapes, asked: Sequence[Asked], names: Sequence[str], start_ranks: Mapping[str, int] | None
) -> tuple[list[EdgePlan], list[LeftOut]]:
    """What run.toml says, for those that can hold it, and that can do a step of it by the deadline where edges are cut off there.

    Machines of one kind are looked at once.
    """
    kinds = [dataclasses.replace(one, edge=one.edge.model_copy(update={"name": "edge", "data": None})) for one in asked]
    settings = {
        kind: _setting(config, shapes, kind.edge, {name: _rank(config, kind.edge, name, start_ranks) for name in names})
        for kind in dict.fromkeys(kinds)
    }  # fmt: skip
    short = {kind for kind, setting in settings.items() if kind.edge.memory is not None and setting.peak_bytes > kind.edge.memory}
    named = list(zip(asked, kinds, strict=True))
    if short and (config.plan.infeasible == "refuse" or short.issuperset(kinds)):
        refuse([(one.edge.name, one.edge.memory, settings[kind]) for one, kind in named if one.edge.memory is not None])
    plans = {kind: _edge_plan(config, kind, setting) for kind, setting in settings.items() if kind not in short}
    slow = {kind for kind, plan in plans.items() if plan.num_steps == 0}
    if slow and (config.plan.infeasible == "refuse" or (short | slow).issuperset(kinds)):
        raise _no_time([one for one, kind in named if kind in slow], len(asked))
    left_out = [LeftOut(one.edge.name, _too_much(one, settings[kind])) for one, kind in named if kind in short]
    left_out += [LeftOut(one.edge.name, _no_step(one)) for one, kind in named if kind in slow]
    fitting = [(one, plans[kind]) for one, kind in named if kind not in short | slow]
    return [dataclasses.replace(plan, name=one.edge.name) for one, plan in fitting], left_out


def _too_much(asked: Asked, setting: Setting) -> str:
    memory = asked.edge.memory or 0
    return f"{needs(asked.edge.name, memory, setting)}; {advice(memory, setting)}"


def _no_step(asked: Asked) -> str:
    return f"{asked.edge.name} cannot do one step in {format_seconds(asked.deadline or 0.0)} by its declared speed and link"


def _no_time(slow: Sequence[Asked], num_edges: int) -> InfeasibleError:
    return InfeasibleError(
        f"{len(slow)} of {num_edges} edges cannot do one step by the deadline",
        where=", ".join(f"[[edge]] {one.edge.name}" for one in slow), got="; ".join(map(_no_step, slow)),
        expected="at least one step a round",
        do='raise plan.round_deadline, lower batch_size, rank or max_length, or write infeasible = "leave-out" below [plan]',
    )  # fmt: skip


def _growing(
    config: RunConfig, shapes: BaseShapes, asked: Sequence[Asked], names: Sequence[str], rounds_done: int
) -> tuple[list[EdgePlan], list[LeftOut]]:
    """What the stage after so many rounds says; an edge takes part in all stages or, where the last is too much for it, in none."""

    def planned(growth: Growth, of: Sequence[Asked]) -> tuple[list[EdgePlan], list[LeftOut]]:
        return _as_written(config, shapes, of, modules := growth.modules(shapes, names), dict.fromkeys(modules, growth.rank))

    last, now = growths_of(config)[-1], growth_after(config, rounds_done)
    plans, left_out = planned(last, asked)
    if now != last:
        fitting = {plan.name for plan in plans}
        plans, _ = planned(now, [one for one in asked if one.edge.name in fitting])
    words = f"stage {now.number} of {now.num_stages}"
    return [dataclasses.replace(plan, why=f"{words}; {plan.why}") for plan in plans], left_out


def _setting(config: RunConfig, shapes: BaseShapes, edge: Edge, ranks: Mapping[str, int]) -> Setting:
    """What the configuration asks of this edge; checkpointing comes on by itself where declared memory needs it."""
    row_tokens = min(config.data.max_length, shapes.max_positions or config.data.max_length)
    asked, precision_bits = config.train.gradient_checkpointing, PRECISION_BITS[config.model.precision]
    there = elsewhere(config, shapes) if edge.mode == "split" else range(0)
    merges = config.select.policy != "all" and config.select.killed == "merge"
    quantize = config.model.quantize if edge.bits is None else edge.bits
    bits = precision_bits if quantize == "auto" or edge.mode != "local" else quantize
    setting = Setting(
        shapes, ranks, bits, config.train.batch_size, row_tokens, asked is True, there, ranks if merges else (), edge.process_memory,
        precision_bits // 8,
    )
    too_large = edge.memory is not None and setting.peak_bytes > edge.memory
    return dataclasses.replace(setting, gradient_checkpointing=True) if asked == "auto" and too_large else setting


def _edge_plan(config: RunConfig, asked: Asked, setting: Setting) -> EdgePlan:
    edge, accumulate, num_steps = asked.edge, config.train.accumulate, asked.num_steps
    if edge.mode == "cloud":
        return EdgePlan(
            edge.name, "cloud", setting.bits, setting.batch_size, accumulate, setting.ranks, num_steps,
            setting.gradient_checkpointing, 0, None, 0, 0, "none", "for comparison: its rows leave it (not counted here)",
        )  # fmt: skip
    costs = costs_of(config, setting, accumulate=accumulate, split=edge.mode == "split")
    by_itself = setting.gradient_checkpointing and config.train.gradient_checkpointing == "auto"
    in_time = steps_by(asked, costs, num_steps)
    words, cut = _why(setting, edge.memory, by_itself), config.federated.late == "cut" and in_time < num_steps
    if cut:
        words = f"{in_time} of {num_steps} steps, as many as it can do in {format_seconds(asked.deadline or 0.0)}; {words}"
    bound = _bound(memory=by_itself, time=cut)
    plan = _plan_of(edge, setting, accumulate, costs, in_time if cut else num_steps, bound, words)
    return dataclasses.replace(plan, under_training=1 - in_time / num_steps)


def _bound(*, memory: bool, time: bool) -> Binding:
    if memory and time:
        return "memory, deadline"
    return "memory" if memory else "deadline" if time else "none"


def _plan_of(
    edge: Edge, setting: Setting, accumulate: int, costs: Costs, num_steps: int, bound: Binding, words: str
) -> EdgePlan:
    return EdgePlan(
        name=edge.name, mode="split" if edge.mode == "split" else "local", bits=setting.bits, batch_size=setting.batch_size,
        accumulate=accumulate, ranks=setting.ranks, num_steps=num_steps, gradient_checkpointing=setting.gradient_checkpointing,
        predicted_peak_bytes=setting.peak_bytes, predicted_seconds=costs.round_seconds(edge, num_steps),
        up_bytes=costs.round_up_bytes(num_steps), down_bytes=costs.round_down_bytes(num_steps), binding=bound, why=words,
    )  # fmt: skip


def steps_by(asked: Asked, costs: Costs, most: int) -> int:
    """Steps that an edge can do by the deadline, at most so many."""
    without, one = costs.round_seconds(asked.edge, 0), costs.round_seconds(asked.edge, 1)
    if asked.deadline is None or without is None or one is None:
        return most
    if one <= without:
        return most if without <= asked.deadline else 0
    return max(0, min(most, math.floor((asked.deadline - without) / (one - without) * (1 + 1e-12))))


def _planned(planner: Planner, asked: Sequence[Asked]) -> tuple[list[EdgePlan], list[LeftOut]]:
    """What suits every edge best."""
    config = planner.config
    decided = [None if one.edge.mode == "cloud" else planner.decide(one) for one in asked]
    nothing = [one for one, decision in zip(asked, decided, strict=True) if decision is None and one.edge.mode != "cloud"]
    left_out = [LeftOut(one.edge.name, _nothing_fits(planner, one)) for one in nothing]
    if left_out and (config.plan.infeasible == "refuse" or len(left_out) == len(asked)):
        raise InfeasibleError(
            f"nothing fits {len(left_out)} of {len(asked)} edges", where=", ".join(f"[[edge]] {edge.name}" for edge in left_out),
            got="; ".join(_declared(one) for one in nothing), expected="; ".join(f"{edge.name}: {edge.why}" for edge in left_out),
            do='give these edges more, choose a smaller base, shorten max_length, or write infeasible = "leave-out" below [plan]',
        )  # fmt: skip
    steps = _steps(planner, asked, decided)
    plans = [
        _cloud(planner, one) if decision is None else _explained(planner, one, decision, steps[one.edge.name])
        for one, decision in zip(asked, decided, strict=True) if decision is not None or one.edge.mode == "cloud"
    ]  # fmt: skip
    return plans, left_out


def _steps(planner: Planner, asked: Sequence[Asked], decided: Sequence[Decision | None]) -> dict[str, int]:
    """Steps of every edge: as asked, or as many as there is time for."""
    config = planner.config
    known = [(one, planner.costs(decision)) for one, decision in zip(asked, decided, strict=True) if decision is not None]
    if config.plan.steps == "asked":
        return {one.edge.name: one.num_steps for one, _ in known}
    slowest = max((costs.round_seconds(one.edge, one.num_steps) or 0.0 for one, costs in known), default=0.0)
    by = config.plan.round_deadline or slowest or None

    def filled(one: Asked, costs: Costs) -> int:
        if costs.round_seconds(one.edge, 1) is None:
            return one.num_steps
        most = int(config.plan.most_steps * one.num_steps)
        return max(one.num_steps, steps_by(dataclasses.replace(one, deadline=by), costs, most))

    return {one.edge.name: filled(one, costs) for one, costs in known}


def _explained(planner: Planner, asked: Asked, decision: Decision, num_steps: int) -> EdgePlan:
    bound = binding(planner, asked, decision)
    priced = prices(planner, asked, decision, bound)
    edge = asked.edge.model_copy(update={"mode": "split" if decision.place.split else "local"})
    words = why(planner, asked, decision, bound, priced)
    plan = _plan_of(edge, decision.setting, decision.accumulate, planner.costs(decision), num_steps, bound, words)
    return dataclasses.replace(plan, objective=decision.objective, prices=priced, warm_up=planner.warm_up(asked.edge, decision.place))


def _cloud(planner: Planner, asked: Asked) -> EdgePlan:
    config = planner.config
    ranks = dict.fromkeys(planner.pool, asked.edge.rank or config.adapter.rank)
    return _edge_plan(config, asked, _setting(config, planner.shapes, asked.edge, ranks))


def _nothing_fits(planner: Planner, asked: Asked) -> str:
    return "; ".join(missing(planner.shortage(asked, place)) for place in planner.places(asked.edge))


def _declared(asked: Asked) -> str:
    memory = f"{format_bytes(asked.edge.memory)} of memory" if asked.edge.memory is not None else "no limit of memory"
    deadline = f", {asked.deadline:g} s a round" if asked.deadline is not None else ""
    return f"{asked.edge.name} declares {memory}{deadline}"


def _why(setting: Setting, memory_bytes: int | None, by_itself: bool) -> str:
    ranks = sorted(set(setting.ranks.values()))
    where = f"blocks {setting.elsewhere.start} to {setting.elsewhere.stop - 1} in the host; " if setting.elsewhere else ""
    batch = f"{setting.batch_size} x {setting.row_tokens} tokens"
    what = f"{where}rank {_span(ranks)} on {len(setting.ranks)} modules, {batch}, as run.toml says"
    if memory_bytes is None:
        return f"{what}; no memory is declared, so that none is a limit"
    if by_itself:
        plain = dataclasses.replace(setting, gradient_checkpointing=False)
        return (
            f"{what}; gradient checkpointing is on, because without it {format_bytes(plain.peak_bytes)} would be needed"
            f" and {format_bytes(memory_bytes)} are declared; {format_bytes(plain.peak_bytes - memory_bytes)} more would switch it off"
        )
    spare = f"{what}; {format_bytes(memory_bytes - setting.peak_bytes)} of the declared memory are left"
    larger = largest_batch(setting, memory_bytes)
    return f"{spare}, enough for batch_size = {larger}" if larger > setting.batch_size else spare


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
