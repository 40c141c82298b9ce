"""What every edge is going to do, decided from configuration and shapes alone: scores and sizes in, a plan out."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from atoll.adapters.targets import resolve_targets
from atoll.config.schema import DEFAULT_LOCAL_STEPS, PRECISION_BITS, Edge, RunConfig
from atoll.cost.formulas import adapter_parameters
from atoll.cost.split_traffic import remote_blocks
from atoll.errors import InfeasibleError
from atoll.planner.costs import Costs, costs_of
from atoll.planner.edge_plan import EdgePlan, FleetPlan, LeftOut, Mode, Span
from atoll.planner.feasibility import Setting, advice, as_written, frozen_delta_in_words, needs, refuse
from atoll.planner.fedadapter import GrowthStage, growth_stage_after, growth_stages
from atoll.planner.fedpipe.explain import Binding, binding, missing, prices, why
from atoll.planner.fedpipe.fedpipe import Asked, Decision, Planner
from atoll.planner.frozen_delta import FrozenDelta, frozen_delta
from atoll.planner.importance import Importance, by_type, uniform
from atoll.shapes import BaseShapes
from atoll.units import format_bytes, format_seconds

LOCAL_EDGE = "local"
"""The one edge of a run without [[edge]]."""


RanksOf = Callable[[Edge], Mapping[str, int]]
"""Ranks of an edge, by full module name."""


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
        (under,) = _frozen_delta(config, shapes, asked, [(config.run.rounds, _at_most(config, names))], _widest(start_ranks))
        plans, left_out = _planned(Planner(config, shapes, names, _worth(config, names, importance), under.ranks), asked)
        spans = [Span(config.run.rounds, plans, under)]
    elif config.plan.policy == "fedadapter":
        spans, left_out = _growing(config, shapes, asked, names)
        plans = _of_stage(config, spans, rounds_done)
    else:
        spans, left_out = _spans(config, shapes, asked, [(config.run.rounds, _said(config, names, start_ranks))], start_ranks)
        plans = list(spans[0].plans)
    largest = {name: max((plan.ranks.get(name, 0) for plan in spans[-1].plans), default=0) for name in names}
    unknown = "unknown" if any(plan.warm_up for plan in plans) else "none"
    kind = None if not plans_itself else unknown if importance is None else importance.kind
    seconds = [span.seconds for span in spans if span.seconds is not None]
    return FleetPlan(
        tuple(plans), config.run.rounds, adapter_parameters(shapes, largest), shapes.num_parameters,
        sum(seconds) if len(seconds) == len(spans) else None, sum(span.up_bytes for span in spans),
        sum(span.down_bytes for span in spans), tuple(left_out), kind, tuple(names),
    )  # fmt: skip


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


def _frozen_delta(
    config: RunConfig, shapes: BaseShapes, asked: Sequence[Asked], wanted: Sequence[tuple[int, RanksOf]],
    start_ranks: Mapping[str, int] | None,
) -> list[FrozenDelta]:  # fmt: skip
    """The frozen delta in each span of so many rounds at such ranks."""
    spans = [(num_rounds, [ranks_of(one.edge) for one in asked]) for num_rounds, ranks_of in wanted]
    return frozen_delta(config.federated.aggregation, shapes, spans, start_ranks, PRECISION_BITS[config.federated.precision] // 8)


def _spans(
    config: RunConfig, shapes: BaseShapes, asked: Sequence[Asked], wanted: Sequence[tuple[int, RanksOf]],
    start_ranks: Mapping[str, int] | None = None,
) -> tuple[list[Span], list[LeftOut]]:  # fmt: skip
    """So many rounds at such ranks, one after the other; an edge takes part in all or, where the last are too much for it, in none."""
    under = _frozen_delta(config, shapes, asked, wanted, start_ranks)
    plans, left_out = _as_written(config, shapes, asked, wanted[-1][1], under[-1].ranks)
    if left_out:
        fitting = {plan.name for plan in plans}
        asked = [one for one in asked if one.edge.name in fitting]
        under = _frozen_delta(config, shapes, asked, wanted, start_ranks)
    return [
        Span(num_rounds, _as_written(config, shapes, asked, ranks_of, below.ranks)[0], below)
        for (num_rounds, ranks_of), below in zip(wanted, under, strict=True)
    ], left_out


def _as_written(
    config: RunConfig, shapes: BaseShapes, asked: Sequence[Asked], ranks_of: RanksOf, lying: Mapping[str, int]
) -> tuple[list[EdgePlan], list[LeftOut]]:
    """What run.toml says, for those that can hold it, and that can do a step of it by the deadline where edges are cut off there.

    Machines of one kind are looked at once.
    """
    kinds = [dataclasses.replace(one, edge=one.edge.model_copy(update={"name": "edge", "data": None})) for one in asked]
    settings = {kind: _setting(config, shapes, kind.edge, ranks_of(kind.edge), lying) for kind in dict.fromkeys(kinds)}
    short = {kind for kind, setting in settings.items() if kind.edge.memory is not None and setting.peak_bytes > kind.edge.memory}
    named, grows = list(zip(asked, kinds, strict=True)), config.plan.policy == "fedadapter"
    if short and (config.plan.infeasible == "refuse" or short.issuperset(kinds)):
        refuse([(one.edge.name, one.edge.memory, settings[kind]) for one, kind in named if one.edge.memory is not None], grows=grows)
    plans = {kind: _edge_plan(config, kind, setting) for kind, setting in settings.items() if kind not in short}
    slow = {kind for kind, plan in plans.items() if plan.num_steps == 0}
    if slow and (config.plan.infeasible == "refuse" or (short | slow).issuperset(kinds)):
        raise _no_time([one for one, kind in named if kind in slow], len(asked), grows=grows)
    left_out = [LeftOut(one.edge.name, _too_much(one, settings[kind], grows=grows)) for one, kind in named if kind in short]
    left_out += [LeftOut(one.edge.name, _no_step(one)) for one, kind in named if kind in slow]
    fitting = [(one, plans[kind]) for one, kind in named if kind not in short | slow]
    return [dataclasses.replace(plan, name=one.edge.name) for one, plan in fitting], left_out


def _too_much(asked: Asked, setting: Setting, *, grows: bool) -> str:
    memory = asked.edge.memory or 0
    return f"{needs(asked.edge.name, memory, setting)}; {advice(memory, setting, grows=grows)}"


def _no_step(asked: Asked) -> str:
    return f"{asked.edge.name} cannot do one step in {format_seconds(asked.deadline or 0.0)} by its declared speed and link"


def _no_time(slow: Sequence[Asked], num_edges: int, *, grows: bool) -> InfeasibleError:
    lower = f"lower batch_size, {'plan.ranks' if grows else 'rank'} or max_length"
    return InfeasibleError(
        f"{len(slow)} of {num_edges} edges cannot do one step by the deadline",
        where=", ".join(f"[[edge]] {one.edge.name}" for one in slow), got="; ".join(map(_no_step, slow)),
        expected="at least one step a round",
        do=f'raise plan.round_deadline, {lower}, or write infeasible = "leave-out" below [plan]',
    )  # fmt: skip


def _said(config: RunConfig, names: Sequence[str], start_ranks: Mapping[str, int] | None) -> RanksOf:
    """What run.toml or a start adapter says."""

    def ranks_of(edge: Edge) -> Mapping[str, int]:
        if edge.rank is None and start_ranks is not None:
            return start_ranks
        return dict.fromkeys(names, edge.rank or config.adapter.rank)

    return ranks_of


def _at_most(config: RunConfig, names: Sequence[str]) -> RanksOf:
    """The most that a planner may give an edge."""

    def ranks_of(edge: Edge) -> Mapping[str, int]:
        own = config.adapter.rank if edge.mode == "cloud" else max(config.plan.ranks)
        return dict.fromkeys(names, edge.rank or own)

    return ranks_of


def _widest(start_ranks: Mapping[str, int] | None) -> Mapping[str, int]:
    """Modules of one size must cost a planner the same."""
    return dict.fromkeys(start_ranks or {}, max((start_ranks or {}).values(), default=0))


def _growing(
    config: RunConfig, shapes: BaseShapes, asked: Sequence[Asked], names: Sequence[str]
) -> tuple[list[Span], list[LeftOut]]:
    """A span for each stage, whose ranks are those of all edges."""

    def ranks_of(stage: GrowthStage) -> RanksOf:
        ranks = dict.fromkeys(stage.modules(shapes, names), stage.rank)
        return lambda edge: ranks

    return _spans(config, shapes, asked, [(stage.num_rounds, ranks_of(stage)) for stage in growth_stages(config)])


def _of_stage(config: RunConfig, spans: Sequence[Span], rounds_done: int) -> list[EdgePlan]:
    """What edges do in the stage after so many rounds, with the memory that the whole run takes."""
    now = growth_stage_after(config, rounds_done)
    first, end = now.first_round + 1, now.first_round + now.num_rounds
    rounds = f"round {end}" if first == end else f"rounds {first} to {end}"
    found = []
    for stages in zip(*(span.plans for span in spans), strict=True):
        plan, peaks = stages[now.number - 1], [one.predicted_peak_bytes for one in stages]
        most = max(reversed(range(len(stages))), key=peaks.__getitem__) + 1
        words = f"stage {now.number} of {now.num_stages} ({rounds}); {plan.why}"
        if most != now.number:
            words += f"; memory is that of stage {most}: {stages[most - 1].why}"
        found.append(dataclasses.replace(plan, predicted_peak_bytes=max(peaks), why=words))
    return found


def _setting(
    config: RunConfig, shapes: BaseShapes, edge: Edge, ranks: Mapping[str, int], lying: Mapping[str, int] = {}
) -> Setting:
    """What the configuration asks of this edge; checkpointing comes on by itself where declared memory needs it."""
    row_tokens = min(config.data.max_length, shapes.max_positions or config.data.max_length)
    asked, precision_bits = config.train.gradient_checkpointing, PRECISION_BITS[config.model.precision]
    there = remote_blocks(config, shapes) if edge.mode == "split" else range(0)
    merges = config.select.policy != "all" and config.select.killed == "merge"
    quantize = config.model.quantize if edge.bits is None else edge.bits
    bits = precision_bits if quantize == "auto" or edge.mode != "local" else quantize
    setting = Setting(
        shapes, ranks, bits, config.train.batch_size, row_tokens, asked is True, there, ranks if merges else (), edge.process_memory,
        precision_bits // 8, lying, edge.process_memory is None,
    )  # fmt: skip
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
    in_time = costs.steps_by(asked.deadline, edge, num_steps)
    words, cut = as_written(setting, edge.memory, by_itself), config.federated.late == "cut" and in_time < num_steps
    if cut:
        words = _cut_in_words(in_time, num_steps, asked.deadline) + words
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
        up_bytes=costs.round_up_bytes(num_steps), down_bytes=costs.round_down_bytes(num_steps), binding=bound,
        why=words + frozen_delta_in_words(setting),
    )  # fmt: skip


def _planned(planner: Planner, asked: Sequence[Asked]) -> tuple[list[EdgePlan], list[LeftOut]]:
    """What suits every edge best."""
    config = planner.config
    wanted = {one.edge.name: one.num_steps for one in asked}
    asked = [_cut(planner, one) for one in asked] if config.federated.late == "cut" else asked
    decided = [None if one.edge.mode == "cloud" else planner.decide(one) for one in asked]
    nothing = [one for one, decision in zip(asked, decided, strict=True) if decision is None and one.edge.mode != "cloud"]
    left_out = [LeftOut(one.edge.name, _nothing_fits(planner, one)) for one in nothing]
    if left_out and (config.plan.infeasible == "refuse" or len(left_out) == len(asked)):
        raise InfeasibleError(
            f"nothing fits {len(left_out)} of {len(asked)} edges", where=", ".join(f"[[edge]] {edge.name}" for edge in left_out),
            got="; ".join(_declared(one) for one in nothing), expected="\n".join(f"{edge.name}: {edge.why}" for edge in left_out),
            do='give these edges more, choose a smaller base, shorten max_length, or write infeasible = "leave-out" below [plan]',
        )  # fmt: skip
    steps = _steps(planner, asked, decided)
    plans = [
        _cloud(planner, one) if decision is None else _explained(planner, one, decision, *steps[one.edge.name])
        for one, decision in zip(asked, decided, strict=True) if decision is not None or one.edge.mode == "cloud"
    ]  # fmt: skip
    return [_told_if_cut(plan, wanted[plan.name], config.plan.round_deadline) for plan in plans], left_out


def _cut(planner: Planner, asked: Asked) -> Asked:
    """As many of the steps as there is time for with something, where there is no time for all with anything."""
    if not asked.is_timed or asked.edge.mode == "cloud" or planner.decide(asked) is not None:
        return asked
    fewer = [dataclasses.replace(asked, num_steps=number) for number in range(1, asked.num_steps)]
    fitting = bisect_left(fewer, True, key=lambda one: planner.decide(one) is None)
    return fewer[fitting - 1] if fitting else asked


def _told_if_cut(plan: EdgePlan, wanted: int, deadline: float | None) -> EdgePlan:
    if plan.num_steps >= wanted:
        return plan
    words = _cut_in_words(plan.num_steps, wanted, deadline) + plan.why
    return dataclasses.replace(plan, under_training=1 - plan.num_steps / wanted, why=words)


def _cut_in_words(num_steps: int, wanted: int, deadline: float | None) -> str:
    return f"{num_steps} of {wanted} steps, as many as it can do in {format_seconds(deadline or 0.0)}; "


def _steps(planner: Planner, asked: Sequence[Asked], decided: Sequence[Decision | None]) -> dict[str, tuple[int, str]]:
    """Steps of every edge, as asked or as many as there is time for, with what to say of it."""
    config = planner.config
    known = [(one, planner.costs(decision)) for one, decision in zip(asked, decided, strict=True) if decision is not None]
    seconds = {one.edge.name: costs.round_seconds(one.edge, one.num_steps) or 0.0 for one, costs in known}
    slowest = max(seconds, key=seconds.__getitem__, default="")
    by = config.plan.round_deadline or seconds.get(slowest) or None
    until = "the deadline" if config.plan.round_deadline else f"{slowest}, the slowest, is done"

    def filled(one: Asked, costs: Costs) -> tuple[int, str]:
        # How long a step takes is known of an edge that declares its speed.
        if config.plan.steps == "asked" or one.edge.flops is None:
            return one.num_steps, ""
        most = int(config.plan.most_steps * one.num_steps)
        num_steps = max(one.num_steps, costs.steps_by(by, one.edge, most))
        end = "the most" if num_steps == most else f"until {until}"
        return num_steps, f"; {num_steps} steps where {one.num_steps} are asked, {end}" if num_steps > one.num_steps else ""

    return {one.edge.name: filled(one, costs) for one, costs in known}


def _explained(planner: Planner, asked: Asked, decision: Decision, num_steps: int, of_steps: str) -> EdgePlan:
    bound = binding(planner, asked, decision)
    priced = prices(planner, asked, decision, bound)
    edge = asked.edge.model_copy(update={"mode": "split" if decision.place.split else "local"})
    words = why(planner, asked, decision, bound, priced) + of_steps
    plan = _plan_of(edge, decision.setting, decision.accumulate, planner.costs(decision), num_steps, bound, words)
    return dataclasses.replace(plan, objective=planner.worth(decision), prices=priced, warm_up=planner.warm_up(asked.edge, decision.place))


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
