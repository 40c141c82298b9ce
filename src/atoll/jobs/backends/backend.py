"""The seam between the rounds and where edges run: in this process, or on machines of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atoll.federated.flower import ConfigRecord, Grid
from atoll.jobs.job import Job, Participant
from atoll.planner.edge_plan import EdgePlan
from atoll.runs.events import EventLog, Phase


@dataclass(frozen=True, slots=True)
class WorkOrder:
    """What one edge is to do from the next round on, until another work order comes."""

    edge: str
    plan: EdgePlan
    phase: Phase
    total_steps: int
    """The edge's, of the whole run, for the schedule of the learning rate."""
    rounds_before: int
    """Rounds done before."""


class Backend(Protocol):
    """The edges of some rounds, and how to reach them."""

    @property
    def nodes(self) -> Mapping[int, str]:
        """The edges' names by Flower's node ids."""

    @property
    def base_digests(self) -> Mapping[str, str]:
        """Of the bases that edges must show with every update; of an edge that is absent none is asked for."""

    @property
    def grid(self) -> Grid:
        """What carries messages to these nodes and back."""

    def changed(self, job: Job, number: int) -> Job | None:
        """The job with the edges that take part from round `number` on; None: as before. Asked before each round of a federation."""

    def give(self, job: Job, edges: Sequence[Participant], orders: Sequence[WorkOrder]) -> None:
        """Have each of the edges follow its work order, by the plan of `job`; one for each edge."""

    def work_order_record(self, node: int) -> ConfigRecord | None:
        """What a message must bring to this node of its work order; None where the edge has it already."""

    def save(self, folder: Path) -> None:
        """Save in this new folder, or wherever the edges are, what they go on from after this round."""

    def restore(self, folder: Path) -> None:
        """Let the edges go on from what `save` wrote, and from nothing else."""

    def close(self) -> None:
        """The rounds are over; may be called twice."""


BackendFactory = Callable[[Job, Sequence[Participant], Phase, EventLog], Backend]
"""Makes the backend of some edges of a job."""
