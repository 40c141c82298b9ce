"""atoll plan: what each edge would do; trains nothing, loads no weights, and never imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from atoll.config.load import load
from atoll.errors import AdapterFolderError
from atoll.jobs.inputs import base_shapes, edge_rows, given_importance, run_labels
from atoll.planner.edge_plan import FleetPlan
from atoll.planner.plan_fleet import check_plan, plan_fleet
from atoll.selection.selector import check_schedules

_DOWN = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_A\.weight")


def plan(config_path: str | Path, *, overrides: Sequence[str] = ()) -> FleetPlan:
    """The plan of the run that `config_path` describes.

    Raises: InputError leaves for what the user must mend; InfeasibleError where an edge cannot hold the plan, or too few can take part.
    """
    loaded = load(Path(config_path), overrides)
    found = edge_rows(loaded)
    shapes = base_shapes(loaded, len(run_labels(loaded.config, [edge.rows for edge in found])))
    rows = {edge.name: len(edge.rows) for edge in found}
    start = loaded.config.adapter.start
    planned = plan_fleet(
        loaded.config, shapes, rows, start_ranks=None if start is None else _start_ranks(loaded.resolve(start)),
        importance=given_importance(loaded),
    )  # fmt: skip
    check_schedules(loaded.config, planned.rows_per_step, rows)
    check_plan(loaded.config, planned)
    return planned


def _start_ranks(folder: Path) -> dict[str, int]:
    """Rank by module of an adapter folder, from the header of its weights."""
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="numpy") as tensors:
            matches = {key: match for key in tensors.keys() if (match := _DOWN.fullmatch(key))}  # noqa: SIM118  not a mapping
            ranks = {match["module"]: tensors.get_slice(key).get_shape()[0] for key, match in matches.items()}
    except (OSError, SafetensorError) as problem:
        ranks, got = {}, str(problem)
    else:
        got = "no LoRA matrices"
    if not ranks:
        raise AdapterFolderError(
            "the adapter to start from cannot be read", where=str(file), got=got, expected="an adapter folder as PEFT writes it",
            do="give the folder that holds adapter_config.json and adapter_model.safetensors in [adapter] start",
        )  # fmt: skip
    return ranks
