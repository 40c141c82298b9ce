"""A work order as text, for an edge on another machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import get_args

from atoll.errors import ProtocolError
from atoll.jobs.backends.backend import WorkOrder
from atoll.planner.edge_plan import EdgePlan
from atoll.planner.request import WarmUpPlan
from atoll.runs.events import Phase

_NOT_SENT = ("why", "prices")
"""Parts of a plan that are for people."""


@dataclass(frozen=True, slots=True)
class SentOrder:
    """All that an edge must be told."""

    order: WorkOrder
    pool: tuple[str, ...]
    """Full names of all modules that may have an adapter."""
    labels: tuple[str, ...]
    """The classes of the whole run; none where it generates."""
    run_id: str


def to_text(order: WorkOrder, pool: Sequence[str], labels: Sequence[str], run_id: str) -> str:
    """The work order as JSON; equal ones are equal texts."""
    plan = {key: value for key, value in order.plan.to_json().items() if key not in _NOT_SENT}
    told = {"edge": order.edge, "phase": order.phase, "total_steps": order.total_steps, "rounds_before": order.rounds_before}
    return json.dumps({**told, "plan": plan, "pool": list(pool), "labels": list(labels), "run": run_id}, sort_keys=True)


def from_text(text: str) -> SentOrder:
    """What `to_text` wrote.

    Raises: ProtocolError for a text of another version.
    """
    try:
        told = json.loads(text)
        plan, warm_up = told["plan"], told["plan"]["warm_up"]
        known = {field.name: plan[field.name] for field in fields(EdgePlan) if field.name not in _NOT_SENT}
        known |= {"why": "", "warm_up": None if warm_up is None else WarmUpPlan(**warm_up)}
        if told["phase"] not in get_args(Phase):  # It is the name of a folder, too.
            raise ValueError(f"phase {told['phase']!r}")
        order = WorkOrder(told["edge"], EdgePlan(**known), told["phase"], told["total_steps"], told["rounds_before"])
        return SentOrder(order, tuple(told["pool"]), tuple(told["labels"]), str(told["run"]))
    except (ValueError, KeyError, TypeError) as problem:
        raise ProtocolError(
            "a work order cannot be read", got=f"{type(problem).__name__}: {problem}", expected="what this version of Atoll writes",
            do="run the same version of Atoll everywhere",
        ) from None  # fmt: skip
