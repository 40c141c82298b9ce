"""FedPipe: find which weights matter, and give every edge the place, bits, batch and ranks of most worth that it can hold in time.

Source: Fang et al., "Automated Federated Pipeline for Parameter-Efficient Fine-Tuning of Large Language Models", arXiv 2404.06448; the
solvable form is Atoll's (decision 0010). Importance comes from a warm-up (training/), the choice for one edge from search.py, ranks from
ranks.py; here edges become a fleet.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from atoll.config.schema import Edge, RunConfig
from atoll.errors import InfeasibleError
from atoll.planner.as_written import cut_in_words, edge_plan, frozen_deltas, plan_of, setting_of
from atoll.planner.costs import Costs, quickest
from atoll.planner.edge_plan import EdgePlan, LeftOut, Span
from atoll.planner.fedpipe.explain import binding, missing_at, prices, why
from atoll.planner.fedpipe.search import Decision, EdgeSearch
from atoll.planner.planner import Planned
from atoll.planner.request import EdgeRequest, PlanRequest, RanksOf
from atoll.units import counted, format_bytes
from atoll.wire.byte_formulas import WireMode


class FedPipe:
    """[plan] policy = "fedpipe"."""

    decides = True

    def plan(self, request: PlanRequest) -> Planned:
        """What suits every edge best."""
        config, rounds = request.config, request.config.run.rounds
        most = [(rounds, _at_most(config, request.pool))]
        (under,) = frozen_deltas(config, request.shapes, request.edges, most, _widest(request.start_ranks))
        search = EdgeSearch(config, request.shapes, request.pool, request.importance, under.ranks)
        plans, left_out = _planned(search, request.edges)
        return Planned([Span(rounds, plans, under)], plans, left_out)


def _at_most(config: RunConfig, names: Sequence[str]) -> RanksOf:
    """The most that a planner may give an edge."""

    def ranks_of(edge: Edge) -> Mapping[str, int]:
        own = config.adapter.rank if edge.mode == "cloud" else max(config.plan.ranks)
        return dict.fromkeys(names, edge.rank or own)

    return ranks_of


def _widest(start_ranks: Mapping[str, int] | None) -> Mapping[str, int]:
    """Modules of one size must cost a planner the same."""
    return dict.fromkeys(start_ranks or {}, max((start_ranks or {}).values(), default=0))


def _planned(search: EdgeSearch, asked: Sequence[EdgeRequest]) -> tuple[list[EdgePlan], list[LeftOut]]:
    """What suits every edge best."""
    config = search.config
    wanted = {one.edge.name: one.num_steps for one in asked}
    asked = [_cut(search, one) for one in asked] if config.federated.late == "cut" else asked
    decided = [None if one.edge.mode == "cloud" else search.decide(one) for one in asked]
    nothing = [one for one, decision in zip(asked, decided, strict=True) if decision is None and one.edge.mode != "cloud"]
    left_out = [LeftOut(one.edge.name, _nothing_fits(search, one)) for one in nothing]
    if left_out and (config.plan.infeasible == "refuse" or len(left_out) == len(asked)):
        raise InfeasibleError(
            f"nothing fits {len(left_out)} of {counted(len(asked), 'edge')}", where=", ".join(f"[[edge]] {edge.name}" for edge in left_out),
            got="; ".join(_declared(one) for one in nothing), expected="\n".join(f"{edge.name}: {edge.why}" for edge in left_out),
            do='give these edges more, choose a smaller base, shorten max_length, or write infeasible = "leave-out" below [plan]',
        )  # fmt: skip
    steps = _steps(search, asked, decided)
    plans = [
        _cloud(search, one) if decision is None else _explained(search, one, decision, *steps[one.edge.name])
        for one, decision in zip(asked, decided, strict=True) if decision is not None or one.edge.mode == "cloud"
    ]  # fmt: skip
    return [_told_if_cut(plan, wanted[plan.name], config.plan.round_deadline) for plan in plans], left_out


def _cut(search: EdgeSearch, asked: EdgeRequest) -> EdgeRequest:
    """As many of the steps as there is time for with something, where there is no time for all with anything."""
    if not asked.is_timed or asked.edge.mode == "cloud" or search.decide(asked) is not None:
        return asked
    fewer = [dataclasses.replace(asked, num_steps=number) for number in range(1, asked.num_steps)]
    fitting = bisect_left(fewer, True, key=lambda one: search.decide(one) is None)
    return fewer[fitting - 1] if fitting else asked


def _told_if_cut(plan: EdgePlan, wanted: int, deadline: float | None) -> EdgePlan:
    if plan.num_steps >= wanted:
        return plan
    words = cut_in_words(plan.num_steps, wanted, deadline) + plan.why
    return dataclasses.replace(plan, under_training=1 - plan.num_steps / wanted, why=words)


def _steps(search: EdgeSearch, asked: Sequence[EdgeRequest], decided: Sequence[Decision | None]) -> dict[str, tuple[int, str]]:
    """Steps of every edge, as asked or as many as there is time for, with what to say of it."""
    config = search.config
    known = [(one, search.costs(decision)) for one, decision in zip(asked, decided, strict=True) if decision is not None]
    seconds = {one.edge.name: costs.round_seconds(one.edge, one.num_steps) or 0.0 for one, costs in known}
    slowest = max(seconds, key=seconds.__getitem__, default="")
    by = config.plan.round_deadline or seconds.get(slowest) or None
    until = "the deadline" if config.plan.round_deadline else f"{slowest}, the slowest, is done"

    def filled(one: EdgeRequest, costs: Costs) -> tuple[int, str]:
        # How long a step takes is known of an edge that declares its speed.
        if config.plan.steps == "asked" or one.edge.flops is None:
            return one.num_steps, ""
        most = int(config.plan.most_steps * one.num_steps)
        num_steps = max(one.num_steps, costs.steps_by(by, one.edge, most))
        end = "the most" if num_steps == most else f"until {until}"
        return num_steps, f"; {counted(num_steps, 'step')} where {one.num_steps} are asked, {end}" if num_steps > one.num_steps else ""

    return {one.edge.name: filled(one, costs) for one, costs in known}


def _explained(search: EdgeSearch, asked: EdgeRequest, decision: Decision, num_steps: int, of_steps: str) -> EdgePlan:
    bound = binding(search, asked, decision)
    priced = prices(search, asked, decision, bound)
    edge = asked.edge.model_copy(update={"mode": "split" if decision.place.split else "local"})
    words = why(search, asked, decision, bound, priced) + of_steps
    wire_mode, wire_why = _over_its_link(search, edge, decision) if decision.place.split else (None, "")
    plan = plan_of(
        edge, decision.setting, decision.accumulate, search.costs(decision), num_steps, bound, words, wire_mode, wire_why
    )
    return dataclasses.replace(plan, objective=search.worth(decision), prices=priced, warm_up=search.warm_up(asked.edge, decision.place))


def _over_its_link(search: EdgeSearch, edge: Edge, decision: Decision) -> tuple[WireMode, str]:
    """How adapters travel, as the search found it, and why."""
    def in_mode(mode: WireMode) -> Costs:
        return search.costs(dataclasses.replace(decision, place=dataclasses.replace(decision.place, wire_mode=mode)))

    found = search.costs(decision)
    return quickest(in_mode, edge, search.config.wire, lambda costs: int(costs is found))


def _cloud(search: EdgeSearch, asked: EdgeRequest) -> EdgePlan:
    config = search.config
    ranks = dict.fromkeys(search.pool, asked.edge.rank or config.adapter.rank)
    return edge_plan(config, asked, setting_of(config, search.shapes, asked.edge, ranks))


def _nothing_fits(search: EdgeSearch, asked: EdgeRequest) -> str:
    return missing_at(search, asked, search.places(asked.edge))


def _declared(asked: EdgeRequest) -> str:
    memory = f"{format_bytes(asked.edge.memory)} of memory" if asked.edge.memory is not None else "no limit of memory"
    deadline = f", {asked.deadline:g} s a round" if asked.deadline is not None else ""
    return f"{asked.edge.name} declares {memory}{deadline}"
