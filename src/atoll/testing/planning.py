"""Checks of planners: an answer for every edge, which its memory holds, and the same for the same request."""

from __future__ import annotations

from atoll.config.schema import RunConfig
from atoll.errors import InfeasibleError, PartError
from atoll.planner.edge_plan import FleetPlan
from atoll.planner.plan_fleet import plan_fleet
from atoll.shapes import BaseShapes, ModuleShape
from atoll.testing.law import Subject

_NAMES = (("self_attn.q_proj", 64, 64, "attention"), ("self_attn.v_proj", 64, 32, "attention"), ("mlp.up_proj", 64, 128, "mlp"))
_MODULES = tuple(
    ModuleShape(f"layers.{block}.{name}", d_in, d_out, kind, block)  # type: ignore[arg-type]
    for block in range(4)
    for name, d_in, d_out, kind in _NAMES
)
_SHAPES = BaseShapes("llama", 10**6, _MODULES, 64, 1000, 4, None, True, 4.0, 4, 64, False)
_FLEETS: tuple[tuple[dict[str, object], ...], ...] = (
    ({"name": "alone"},),
    ({"name": "large", "memory": "4 GB", "flops": "1 GFLOP/s"}, {"name": "free"}, {"name": "small", "memory": "700 MB"}),
)


def check_planner(subject: Subject) -> None:
    """Raises: BrokenLaw."""
    for edges in _FLEETS:
        config = RunConfig.model_validate({
            "run": {"rounds": 4}, "plan": {"policy": subject.name, "infeasible": "leave-out", "ranks": (2, 4)}, "edge": edges,
            "data": {"max_length": 32}, "options": {subject.name: dict(subject.options)} if subject.options else {},
        })  # fmt: skip
        rows = {str(edge["name"]): 100 for edge in edges}
        for rounds_done in range(4):
            try:
                first, again = (plan_fleet(config, _SHAPES, rows, rounds_done=rounds_done) for _ in range(2))
            except PartError as problem:
                subject.expect(False, f"{problem.got}, where {problem.expected} is asked for")
                return
            except InfeasibleError as problem:
                subject.expect(False, f"edges that could be left out are refused: {problem.got}")
                return
            subject.expect(first.to_json() == again.to_json(), "the same request gives the same plan")
            _check_edges(subject, config, first)


def _check_edges(subject: Subject, config: RunConfig, plan: FleetPlan) -> None:
    memory = {edge.name: edge.memory for edge in config.edge}
    for edge in plan.edges:
        subject.expect(bool(edge.why), f"{edge.name}: a plan says why")
        subject.expect(min(edge.batch_size, edge.accumulate, edge.num_steps, *edge.ranks.values()) >= 1, f"{edge.name}: nothing below 1")
        most = memory[edge.name]
        subject.expect(
            most is None or edge.predicted_peak_bytes <= most, f"{edge.name}: {edge.predicted_peak_bytes} bytes of {most} that it declares"
        )
