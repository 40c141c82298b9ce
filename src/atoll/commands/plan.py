"""atoll plan: what each edge would do; trains nothing and loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from atoll.config.load import LoadedConfig
from atoll.jobs.inputs import base_shapes, data_notes, edge_rows, eval_rows, given_importance, run_labels, start_ranks
from atoll.jobs.results.config import given_config
from atoll.planner.edge_plan import FleetPlan
from atoll.planner.plan_fleet import check_plan, plan_fleet
from atoll.runs.tracker import check_trackers
from atoll.selection.selector import check_schedules
from atoll.tasks.text import row_form


def plan(config_path: str | Path, *, overrides: Sequence[str] = (), trust: bool = False) -> FleetPlan:
    """The plan of the run that a run.toml describes, or of the one in a run's folder, with what is known before it is trained.

    What training would refuse before its first step is refused here, too, but for what weights, a host or that step alone tell.

    Raises: TrustError where a run's folder names code and `trust` does not say that it may; InputError leaves for what the user must mend;
    InfeasibleError where an edge cannot hold the plan, or too few can take part.
    """
    loaded = given_config(Path(config_path), overrides, trust=trust).loaded
    planned = plan_at_once(loaded)
    # What is wrong with the above is answered before the seconds that torch takes to open.
    from atoll.jobs.job import rehearsed
    from atoll.jobs.personal.held_out import check_own_rows

    job = rehearsed(loaded)
    check_own_rows(job)
    return replace(job.plan, notes=planned.notes)


def plan_at_once(loaded: LoadedConfig) -> FleetPlan:
    """The plan by sizes and numbers of rows, without a look at what the rows become.

    Raises: as `plan`.
    """
    check_trackers(loaded.config.track.to)
    found = edge_rows(loaded)
    labels = run_labels(loaded.config, [edge.rows for edge in found])
    shapes = base_shapes(loaded, len(labels))
    held_out = eval_rows(loaded)
    if held_out is not None:
        row_form(loaded.config.data, held_out)
    rows = {edge.name: len(edge.rows) for edge in found}
    start = loaded.config.adapter.start
    planned = plan_fleet(
        loaded.config, shapes, rows, start_ranks=None if start is None else start_ranks(loaded.resolve(start)),
        importance=given_importance(loaded),
    )  # fmt: skip
    check_schedules(loaded.config, planned.rows_per_step, rows)
    check_plan(loaded.config, planned)
    return replace(planned, notes=data_notes(loaded.config, found, labels))
