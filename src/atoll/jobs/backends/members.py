"""Edges that come while a run goes on, and edges that leave it for good: the same run with other members from a round on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from atoll.config.schema import Edge
from atoll.errors import AtollError
from atoll.jobs.job import Job, Participant, by_another_plan
from atoll.planner.edge_plan import LeftOut
from atoll.registry.parts import trait


def with_newcomer(job: Job, edge: Edge, brings: Participant, order: Sequence[str]) -> Job | str:
    """The job with one more edge, in this order of all edges' names; or why it cannot be one before the next run.

    `brings` has the number of its rows, or its examples. The others' plans stay: a plan that would change them is no reason to change what
    is under way.
    """
    if not _plans_each_alone(job):
        return f'plan.policy = "{job.config.plan.policy}" would plan all edges anew'
    if any(one.name == edge.name for one in job.edges):
        return "an edge of this name takes part"
    edges = sorted((*job.config.edge, edge), key=lambda one: order.index(one.name))
    config = job.config.model_copy(update={"edge": tuple(edges)})
    try:
        found = by_another_plan(replace(job, loaded=replace(job.loaded, config=config), edges=(*job.edges, brings)), config)
    except AtollError as problem:
        return problem.page()
    before, after = ({one.name: one.plan for one in each.edges} for each in (job, found))
    if edge.name not in after:
        return "nothing fits it"
    if any(after.get(name) != plan for name, plan in before.items()):
        return "the others would be planned anew with it"
    left = tuple(one for one in job.plan.left_out if one.name != edge.name)
    return replace(found, plan=replace(found.plan, left_out=left), start=job.start)


def without(job: Job, name: str, number: int) -> Job:
    """The job without an edge that is gone, from round `number` on."""
    gone = LeftOut(name, f"it left for good before round {number}")
    config = job.config.model_copy(update={"edge": tuple(edge for edge in job.config.edge if edge.name != name)})
    plan = replace(job.plan, edges=tuple(one for one in job.plan.edges if one.name != name))
    edges = tuple(edge for edge in job.edges if edge.name != name)
    found = replace(job, loaded=replace(job.loaded, config=config), plan=plan, edges=edges)
    if _plans_each_alone(job):  # Who goes on after a stop plans for those who are there, and is to find the same.
        found = by_another_plan(found, config)
    return replace(found, plan=replace(found.plan, left_out=(*found.plan.left_out, gone)), start=job.start)


def with_those_gone(job: Job, plan: Mapping[str, Any]) -> Job:
    """The job that goes on, which names those as left out who by the plan.json of before took part and are no edges any more."""
    known = {one.name for one in job.edges} | {one.name for one in job.plan.left_out}
    gone = [LeftOut(str(one["name"]), str(one["why"])) for one in plan.get("left_out") or () if one["name"] not in known]
    return replace(job, plan=replace(job.plan, left_out=(*job.plan.left_out, *gone)))


def _plans_each_alone(job: Job) -> bool:
    plan = job.config.plan
    return not plan.decides and not trait("planner", plan.policy, "grows")
