"""atoll plan: what each edge would do; trains nothing, loads no weights, and never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from atoll.jobs.inputs import base_shapes, data_notes, edge_rows, given_importance, run_labels, start_ranks
from atoll.jobs.results.config import given_config
from atoll.planner.edge_plan import FleetPlan
from atoll.planner.plan_fleet import check_plan, plan_fleet
from atoll.runs.tracker import check_trackers
from atoll.selection.selector import check_schedules


def plan(config_path: str | Path, *, overrides: Sequence[str] = (), trust: bool = False) -> FleetPlan:
    """The plan of the run that a run.toml describes, or of the one in a run's folder, with what is known before it is trained.

    Raises: TrustError where a run's folder names code and `trust` does not say that it may; InputError leaves for what the user must mend;
    InfeasibleError where an edge cannot hold the plan, or too few can take part.
    """
    loaded = given_config(Path(config_path), overrides, trust=trust).loaded
    check_trackers(loaded.config.track.to)
    found = edge_rows(loaded)
    labels = run_labels(loaded.config, [edge.rows for edge in found])
    shapes = base_shapes(loaded, len(labels))
    rows = {edge.name: len(edge.rows) for edge in found}
    start = loaded.config.adapter.start
    planned = plan_fleet(
        loaded.config, shapes, rows, start_ranks=None if start is None else start_ranks(loaded.resolve(start)),
        importance=given_importance(loaded),
    )  # fmt: skip
    check_schedules(loaded.config, planned.rows_per_step, rows)
    check_plan(loaded.config, planned)
    return replace(planned, notes=data_notes(loaded.config, found, labels))
