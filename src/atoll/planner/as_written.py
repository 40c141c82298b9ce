"""Every edge does what run.toml says, if it can: ranks in, plans out. Other planners that know their ranks use it, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from atoll.config.schema import PRECISION_BITS, Edge, RunConfig
from atoll.cost.split_traffic import remote_blocks
from atoll.errors import InfeasibleError
from atoll.planner.costs import Costs, costs_of, quickest
from atoll.planner.edge_plan import EdgePlan, LeftOut, Span
from atoll.planner.feasibility import Setting, advice, as_written, frozen_delta_in_words, needs, refuse
from atoll.planner.fedpipe.explain import Binding
from atoll.planner.frozen_delta import FrozenDelta, frozen_delta
from atoll.planner.planner import Planned
from atoll.planner.request import EdgeRequest, PlanRequest, RanksOf
from atoll.registry.parts import trait
from atoll.shapes import BaseShapes
from atoll.units import counted, format_seconds
from atoll.wire.byte_formulas import WireMode


class AsWritten:
    """[plan] policy = "as-written"."""

    def plan(self, request: PlanRequest) -> Planned:
        """The rank of [adapter], of a start adapter, or of the edge itself."""
        return planned_at(request, _said(request.config, request.pool, request.start_ranks))


def planned_at(request: PlanRequest, ranks_of: RanksOf) -> Planned:
    """All rounds at these ranks, with batch, bits and place as run.toml says.

    Raises: InfeasibleError naming every edge for which that is too much, unless it may be left out.
    """
    spans, left_out = spans_at(request, [(request.config.run.rounds, ranks_of)], request.start_ranks)
    return Planned(spans, list(spans[0].plans), left_out)


def frozen_deltas(
    config: RunConfig, shapes: BaseShapes, asked: Sequence[EdgeRequest], wanted: Sequence[tuple[int, RanksOf]],
    start_ranks: Mapping[str, int] | None,
) -> list[FrozenDelta]:  # fmt: skip
    """The frozen delta in each span of so many rounds at such ranks."""
    spans = [(num_rounds, [ranks_of(one.edge) for one in asked]) for num_rounds, ranks_of in wanted]
    return frozen_delta(config.federated.aggregation, shapes, spans, start_ranks, PRECISION_BITS[config.federated.precision] // 8)


def spans_at(
    request: PlanRequest, wanted: Sequence[tuple[int, RanksOf]], start_ranks: Mapping[str, int] | None = None
) -> tuple[list[Span], list[LeftOut]]:  # fmt: skip
    """So many rounds at such ranks, one after the other; an edge takes part in all or, where the last are too much for it, in none."""
    config, shapes, asked = request.config, request.shapes, request.edges
    under = frozen_deltas(config, shapes, asked, wanted, start_ranks)
    plans, left_out = _as_written(config, shapes, asked, wanted[-1][1], under[-1].ranks)
    if left_out:
        fitting = {plan.name for plan in plans}
        asked = tuple(one for one in asked if one.edge.name in fitting)
        under = frozen_deltas(config, shapes, asked, wanted, start_ranks)
    return [
        Span(num_rounds, _as_written(config, shapes, asked, ranks_of, below.ranks)[0], below)
        for (num_rounds, ranks_of), below in zip(wanted, under, strict=True)
    ], left_out


def _as_written(
    config: RunConfig, shapes: BaseShapes, asked: Sequence[EdgeRequest], ranks_of: RanksOf, lying: Mapping[str, int]
) -> tuple[list[EdgePlan], list[LeftOut]]:
    """What run.toml says, for those that can hold it, and that can do a step of it by the deadline where edges are cut off there.

    Machines of one kind are looked at once.
    """
    kinds = [dataclasses.replace(one, edge=one.edge.model_copy(update={"name": "edge", "data": None})) for one in asked]
    settings = {kind: setting_of(config, shapes, kind.edge, ranks_of(kind.edge), lying) for kind in dict.fromkeys(kinds)}
    short = {kind for kind, setting in settings.items() if kind.edge.memory is not None and setting.peak_bytes > kind.edge.memory}
    named, grows = list(zip(asked, kinds, strict=True)), trait("planner", config.plan.policy, "grows")
    if short and (config.plan.infeasible == "refuse" or short.issuperset(kinds)):
        refuse([(one.edge.name, one.edge.memory, settings[kind]) for one, kind in named if one.edge.memory is not None], grows=grows)
    plans = {kind: edge_plan(config, kind, setting) for kind, setting in settings.items() if kind not in short}
    slow = {kind for kind, plan in plans.items() if plan.num_steps == 0}
    if slow and (config.plan.infeasible == "refuse" or (short | slow).issuperset(kinds)):
        raise _no_time([one for one, kind in named if kind in slow], len(asked), grows=grows)
    left_out = [LeftOut(one.edge.name, _too_much(one, settings[kind], grows=grows)) for one, kind in named if kind in short]
    left_out += [LeftOut(one.edge.name, _no_step(one)) for one, kind in named if kind in slow]
    fitting = [(one, plans[kind]) for one, kind in named if kind not in short | slow]
    return [dataclasses.replace(plan, name=one.edge.name) for one, plan in fitting], left_out


def _too_much(asked: EdgeRequest, setting: Setting, *, grows: bool) -> str:
    memory = asked.edge.memory or 0
    return f"{needs(asked.edge.name, memory, setting)}; {advice(memory, setting, grows=grows)}"


def _no_step(asked: EdgeRequest) -> str:
    return f"{asked.edge.name} cannot do one step in {format_seconds(asked.deadline or 0.0)} by its declared speed and link"


def _no_time(slow: Sequence[EdgeRequest], num_edges: int, *, grows: bool) -> InfeasibleError:
    lower = f"lower batch_size, {'plan.ranks' if grows else 'rank'} or max_length"
    return InfeasibleError(
        f"{len(slow)} of {counted(num_edges, 'edge')} cannot do one step by the deadline",
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


def setting_of(
    config: RunConfig, shapes: BaseShapes, edge: Edge, ranks: Mapping[str, int], lying: Mapping[str, int] = {}
) -> Setting:
    """What the configuration asks of this edge; checkpointing comes on by itself where declared memory needs it."""
    row_tokens = min(config.data.max_length, shapes.max_positions or config.data.max_length)
    asked, precision_bits = config.train.gradient_checkpointing, PRECISION_BITS[config.model.precision]
    there = remote_blocks(config, shapes) if edge.mode == "split" else range(0)
    quantize = config.model.quantize if edge.bits is None else edge.bits
    bits = precision_bits if quantize == "auto" or edge.mode != "local" else quantize
    setting = Setting(
        shapes, ranks, bits, config.train.batch_size, row_tokens, asked is True, there, ranks if config.select.merges else (),
        edge.process_memory, precision_bits // 8, lying, edge.process_memory is None,
    )  # fmt: skip
    too_large = edge.memory is not None and setting.peak_bytes > edge.memory
    return dataclasses.replace(setting, gradient_checkpointing=True) if asked == "auto" and too_large else setting


def edge_plan(config: RunConfig, asked: EdgeRequest, setting: Setting) -> EdgePlan:
    """The plan of an edge with this setting, cut where its rounds end at the deadline."""
    edge, accumulate, num_steps = asked.edge, config.train.accumulate, asked.num_steps
    if edge.mode == "cloud":
        return EdgePlan(
            edge.name, "cloud", setting.bits, setting.batch_size, accumulate, setting.ranks, num_steps,
            setting.gradient_checkpointing, 0, None, 0, 0, "none", "for comparison: its rows leave it (not counted here)",
        )  # fmt: skip
    costs, wire_mode, wire_why = _over_its_link(config, asked, setting)
    by_itself = setting.gradient_checkpointing and config.train.gradient_checkpointing == "auto"
    in_time = costs.steps_by(asked.deadline, edge, num_steps)
    words, cut = as_written(setting, edge.memory, by_itself), config.federated.late == "cut" and in_time < num_steps
    if cut:
        words = cut_in_words(in_time, num_steps, asked.deadline) + words
    bound = _bound(memory=by_itself, time=cut)
    plan = plan_of(edge, setting, accumulate, costs, in_time if cut else num_steps, bound, words, wire_mode, wire_why)
    return dataclasses.replace(plan, under_training=1 - in_time / num_steps)


def _over_its_link(config: RunConfig, asked: EdgeRequest, setting: Setting) -> tuple[Costs, WireMode | None, str]:
    """What the setting costs and, with a host, how adapters travel, and why."""
    def costs(mode: WireMode | None) -> Costs:
        return costs_of(config, setting, accumulate=config.train.accumulate, wire_mode=mode)

    if asked.edge.mode != "split":
        return costs(None), None, ""
    mode, why = quickest(costs, asked.edge, config.wire, lambda one: one.steps_by(asked.deadline, asked.edge, asked.num_steps))
    return costs(mode), mode, why


def _bound(*, memory: bool, time: bool) -> Binding:
    if memory and time:
        return "memory, deadline"
    return "memory" if memory else "deadline" if time else "none"


def plan_of(
    edge: Edge, setting: Setting, accumulate: int, costs: Costs, num_steps: int, bound: Binding, words: str,
    wire_mode: WireMode | None, wire_why: str,
) -> EdgePlan:  # fmt: skip
    """The plan of an edge that trains itself."""
    return EdgePlan(
        name=edge.name, mode="split" if edge.mode == "split" else "local", bits=setting.bits, batch_size=setting.batch_size,
        accumulate=accumulate, ranks=setting.ranks, num_steps=num_steps, gradient_checkpointing=setting.gradient_checkpointing,
        predicted_peak_bytes=setting.peak_bytes, predicted_seconds=costs.round_seconds(edge, num_steps),
        up_bytes=costs.round_up_bytes(num_steps), down_bytes=costs.round_down_bytes(num_steps), binding=bound,
        why=words + frozen_delta_in_words(setting) + (f"; wire {wire_why}" if wire_why else ""), wire_mode=wire_mode, wire_why=wire_why,
    )  # fmt: skip


def cut_in_words(num_steps: int, wanted: int, deadline: float | None) -> str:
    """What a plan says of steps that are cut."""
    return f"{num_steps} of {counted(wanted, 'step')}, as many as it can do in {format_seconds(deadline or 0.0)}; "
