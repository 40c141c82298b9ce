"""Whether a run can be done by a plan: what neither the configuration nor one edge's plan shows alone."""

from __future__ import annotations

from atoll.config.conflicts import KEEPS_FROZEN_DELTA, classes_in_a_host, frozen_delta_in_a_host, full_weights_in_a_host
from atoll.config.document import few
from atoll.config.schema import RunConfig
from atoll.errors import InfeasibleError
from atoll.planner.edge_plan import FleetPlan


def check_plan(config: RunConfig, plan: FleetPlan) -> None:
    """Whether a host may serve the edges that the plan has it serve, and whether enough edges take part.

    Raises: ConflictError, InfeasibleError.
    """
    split = [edge.name for edge in plan.edges if edge.mode == "split"]
    if split and config.federated.aggregation in KEEPS_FROZEN_DELTA:
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
