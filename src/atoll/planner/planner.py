"""The seam of planning: what a planner is, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from atoll.planner.edge_plan import EdgePlan, LeftOut, Span
from atoll.planner.request import PlanRequest


@dataclass(frozen=True, slots=True)
class Planned:
    """What a planner answers."""

    spans: Sequence[Span]
    """All rounds of the run, in order."""
    plans: Sequence[EdgePlan]
    """What edges do in the rounds that follow those that are done."""
    left_out: Sequence[LeftOut]


class Planner(Protocol):
    """A planner: pure, so that the same request always gives the same plan.

    Its class may say `decides` (it finds mode, bits, batch and ranks by itself, by importance) and `grows` (plan.ranks are those of stages;
    it then has `stages`, which says of a config before which rounds the plan is made anew, and how many rounds follow).
    """

    def plan(self, request: PlanRequest) -> Planned:
        """A plan for every edge of the request, or why it is left out.

        Raises: InfeasibleError naming every edge for which nothing fits.
        """
