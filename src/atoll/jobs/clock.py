"""Simulated time: how long edges would take by their declared speeds and links, while training is real."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from atoll.config.schema import Edge, RunConfig
from atoll.cost.formulas import round_seconds
from atoll.cost.work import Work
from atoll.units import format_seconds


@dataclass(frozen=True, slots=True)
class Clock:
    """Tells the time of edges and rounds; None where speed and link are not declared."""

    edges: Mapping[str, Edge]
    deadline: float | None
    """Seconds of a round."""
    drops: bool
    """Whether a round ends at its deadline, without those that are late."""
    host_flops: float | None = None
    """Speed of the host; None: what it computes takes no time."""

    def edge_seconds(self, name: str, work: Work, transfer_bytes: int) -> float | None:
        """Of some work on one edge, and of what crosses for it."""
        edge = self.edges.get(name)
        if edge is None:
            return None
        return round_seconds(
            work.flops.flops, transfer_bytes, flops_per_second=edge.flops, bits_per_second=edge.bandwidth,
            latency_seconds=edge.latency, round_trips=1 + work.num_round_trips,  # The adapter comes and goes.
            host_seconds=work.host_flops / self.host_flops if self.host_flops else 0.0,
        )  # fmt: skip

    def lateness(self, seconds: float | None) -> str | None:
        """Why an edge that took so long is not counted; None where it is."""
        if not self.drops or self.deadline is None or seconds is None or seconds <= self.deadline:
            return None
        return f"late: {format_seconds(seconds)} by its declared speed and link, and a round ends after {format_seconds(self.deadline)}"

    def round_seconds(self, edges_seconds: Iterable[float | None], num_late: int) -> float | None:
        """A round lasts as long as its slowest edge, or to the deadline where one was late; None where an edge's time is not known."""
        seconds = list(edges_seconds)
        known = [one for one in seconds if one is not None]
        if len(known) < len(seconds) or not (known or num_late):
            return None
        return max([*known, *([self.deadline] if num_late and self.deadline is not None else [])])


def clock_of(config: RunConfig) -> Clock:
    """The clock of a run."""
    edges = {edge.name: edge for edge in config.edge}
    return Clock(edges, config.plan.round_deadline, config.federated.late == "drop", config.wire.host_flops)
