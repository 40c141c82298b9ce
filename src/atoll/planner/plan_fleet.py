"""What every edge is going to do, decided from configuration and shapes alone: scores and sizes in, a plan out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from atoll.adapters.targets import resolve_targets, unreached
from atoll.config.checks.federation import frozen_delta_in_a_host
from atoll.config.checks.whole_base import classes_in_a_host, full_weights_in_a_host
from atoll.config.document import few
from atoll.config.schema import DEFAULT_LOCAL_STEPS, Edge, RunConfig
from atoll.cost.formulas import adapter_parameters
from atoll.errors import ConflictError, InfeasibleError, PartError
from atoll.planner.edge_plan import EdgePlan, FleetPlan, Mode
from atoll.planner.importance import Importance, by_type, uniform
from atoll.planner.planner import Planned, Planner
from atoll.planner.request import EdgeRequest, PlanRequest
from atoll.registry.parts import make, trait, wrong_result
from atoll.shapes import BaseShapes
from atoll.units import counted

LOCAL_EDGE = "local"
"""The one edge of a run without [[edge]]."""


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
    targets, without = config.adapter.targets, shapes.without_adapter
    pool = tuple(start_ranks) if start_ranks is not None else resolve_targets(targets, shapes.modules, without)
    outside = [module.name for module in shapes.modules if module.outside and module.name in pool]
    if outside and (config.plan.decides or trait("planner", config.plan.policy, "grows")):
        raise ConflictError(
            "a planner does not decide about embedding and head", where="[plan] policy",
            got=f"{config.plan.policy}, and {outside[0]} among the targets", expected='policy = "as-written", or targets inside the blocks',
            do=f"take {outside[0]} out of [adapter] targets, or leave policy out",
        )  # fmt: skip
    if config.adapter.kind == "full":
        widths = {module.name: min(module.d_in, module.d_out) for module in shapes.modules}
        start_ranks = {name: widths[name] for name in pool}
    decides = config.plan.decides
    edges = config.edge or (Edge(name=LOCAL_EDGE),)
    edges = tuple(_placed(edge, config.run.placement, has_host, decides=decides) for edge in edges)
    steps = [steps_per_round(config, edges_rows[edge.name] if edges_rows is not None else None) for edge in edges]
    asked = tuple(EdgeRequest(edge, num_steps, config.plan.round_deadline) for edge, num_steps in zip(edges, steps, strict=True))
    planner: Planner = make("planner", config.plan.policy, config.options_of(config.plan.policy))
    request = PlanRequest(config, shapes, asked, tuple(pool), start_ranks, _worth(config, pool, importance), rounds_done)
    planned = planner.plan(request)
    check_planned(request, planned)
    spans, plans = planned.spans, planned.plans
    largest = {name: max((plan.ranks.get(name, 0) for plan in spans[-1].plans), default=0) for name in pool}
    unknown = "unknown" if any(plan.warm_up for plan in plans) else "none"
    kind = None if not decides else unknown if importance is None else importance.kind
    seconds = [span.seconds for span in spans if span.seconds is not None]
    personal = _personal_seconds(config, spans[-1].plans)
    whole = sum(seconds) if len(seconds) == len(spans) else None
    return FleetPlan(
        tuple(plans), config.run.rounds, adapter_parameters(shapes, largest), shapes.num_parameters,
        None if whole is None else whole + (personal or 0.0), sum(span.up_bytes for span in spans),
        sum(span.down_bytes for span in spans), tuple(planned.left_out), kind, tuple(pool),
        remarks=tuple(_remarks(config, shapes, plans)), personal_steps=config.federated.personal_steps, personal_seconds=personal,
    )  # fmt: skip


def _personal_seconds(config: RunConfig, plans: Sequence[EdgePlan]) -> float | None:
    """Of the edges' own copies on the slowest edge: as long as so many steps of a round, which counts messages, too.

    None where one's time is not known.
    """
    steps = config.federated.personal_steps
    known = [plan.predicted_seconds * steps / plan.num_steps for plan in plans if plan.predicted_seconds is not None and steps is not None]
    return max(known) if known and len(known) == len(plans) else None


def _remarks(config: RunConfig, shapes: BaseShapes, plans: Sequence[EdgePlan]) -> Iterator[str]:
    left = None if config.adapter.start is not None else unreached(config.adapter.targets, shapes.without_adapter)
    if left is not None:
        yield left
    precise = 32 if config.model.precision == "fp32" else 16
    if shapes.num_wide and any(plan.bits < precise for plan in plans):
        share = shapes.num_wide / shapes.num_parameters
        yield f"{share:.0%} of the base's weights stay in {precise} bits for all quantize says: experts in one tensor are no linear modules"


def by_usable_rows(
    plan: FleetPlan, planned: dict[str, int], usable: dict[str, int], plan_for: Callable[..., FleetPlan]
) -> tuple[FleetPlan, dict[str, int]]:  # fmt: skip
    """The plan of edges whose rows cannot all be used, and the rows by edge that it is made for: an epoch counts no others.

    Bases are loaded by then, so that `plan` stays where `plan_for` the fewer rows asks for others.
    """
    again = plan if usable == planned else plan_for(edges_rows=usable)
    before, after = ([(edge.name, edge.mode, edge.bits) for edge in one.edges] for one in (plan, again))
    return (again, usable) if before == after else (plan, planned)


def check_planned(request: PlanRequest, planned: Planned) -> None:
    """Whether a planner answered what it was asked: every edge once, with modules of the pool, all rounds.

    Raises: PartError naming what it did instead.
    """
    policy = request.config.plan.policy
    if not isinstance(planned, Planned) or not all(isinstance(one, EdgePlan) for one in planned.plans):
        raise wrong_result("planner", policy, "plan", planned, "a Planned (atoll.planner.planner)")
    asked, pool = [one.edge.name for one in request.edges], set(request.pool)
    answered = [*(plan.name for plan in planned.plans), *(edge.name for edge in planned.left_out)]
    foreign = {name for span in planned.spans for plan in span.plans for name in plan.ranks} - pool
    ranks = [item for span in planned.spans for plan in span.plans for item in plan.ranks.items()]
    useless = [(name, rank) for name, rank in ranks if not isinstance(rank, int) or rank < 1]
    rounds = sum(span.num_rounds for span in planned.spans)
    got = ""
    if sorted(answered) != sorted(asked):
        got = f"answers for {few(answered)}"
    elif not planned.plans:
        got = "no edge that takes part"
    elif useless:
        got = f"rank {useless[0][1]!r} for {useless[0][0]}"
    elif foreign:
        got = f"a rank for {min(foreign)}, which is not in the pool"
    elif rounds != request.config.run.rounds:
        got = f"a plan of {counted(rounds, 'round')}"
    if got:
        raise PartError(
            f"the planner {policy} did not answer what it was asked", where="[plan] policy", got=got,
            expected=f"a plan, or why there is none, for each of {few(asked)}, and {counted(request.config.run.rounds, 'round')}",
            do='see what it returns with atoll.testing.check("planner", ...)',
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
    # An epoch ends with a step of its own, which may hold less than the others.
    epoch_steps = math.ceil(math.ceil(num_rows / config.train.batch_size) / config.train.accumulate)
    return max(1, math.ceil(config.train.local_epochs * epoch_steps))


def _placed(edge: Edge, placement: Literal["auto"] | Mode, has_host: bool, *, decides: bool) -> Edge:
    """The edge with a mode that is not "auto", unless a planner finds it; of one that trains nothing itself, no limit counts."""
    asked = placement if edge.mode == "auto" else edge.mode
    by_itself: Literal["auto", "split", "local"] = "auto" if decides else "split" if has_host else "local"
    mode = by_itself if asked == "auto" else asked
    limits = {"memory": None, "flops": None, "bandwidth": None, "latency": None} if mode == "cloud" else {}
    return edge.model_copy(update={"mode": mode, **limits})


def check_plan(config: RunConfig, plan: FleetPlan) -> None:
    """Whether a host may serve the edges that the plan has it serve, and whether enough edges take part.

    Raises: ConflictError, InfeasibleError.
    """
    split = [edge.name for edge in plan.edges if edge.mode == "split"]
    if split and trait("aggregation", config.federated.aggregation, "keeps_frozen_delta"):
        raise frozen_delta_in_a_host(config, split)
    if split and config.adapter.kind == "full":
        raise full_weights_in_a_host(split)
    if split and config.model.task == "classify":
        raise classes_in_a_host(f'mode = "split": {few(split)}')
    if config.federated.min_edges > len(plan.edges):
        raise InfeasibleError(
            "a round needs more edges than can take part", where="[federated] min_edges",
            got=f"{config.federated.min_edges}, and {len(plan.edges)} that can; left out: {few([edge.name for edge in plan.left_out])}",
            expected="no more than can take part", do="lower federated.min_edges, or give the edges that are left out more",
        )  # fmt: skip
