"""What a planner is asked: for every edge, and for the fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from atoll.config.schema import Edge, RunConfig
from atoll.shapes import BaseShapes

RanksOf = Callable[[Edge], Mapping[str, int]]
"""Ranks of an edge, by full module name."""


@dataclass(frozen=True, slots=True)
class EdgeRequest:
    """What is asked of an edge."""

    edge: Edge
    num_steps: int
    """Optimizer steps of a round."""
    deadline: float | None
    """Seconds of a round."""

    @property
    def is_timed(self) -> bool:
        """Whether the deadline can be a limit: the edge declares how fast it is, or its link."""
        return self.deadline is not None and bool(self.edge.flops or self.edge.bandwidth or self.edge.latency)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """All that a plan of a fleet is made of."""

    config: RunConfig
    shapes: BaseShapes
    edges: tuple[EdgeRequest, ...]
    """In the order of the configuration."""
    pool: tuple[str, ...]
    """Full names of all modules that may have an adapter."""
    start_ranks: Mapping[str, int] | None
    """Of [adapter] start, which hold for all edges but those that name a rank of their own; None: there is none."""
    importance: Mapping[str, float]
    """Of every module of the pool; all alike where it is not known."""
    rounds_done: int = 0


@dataclass(frozen=True, slots=True)
class WarmUpPlan:
    """What an edge can hold with adapters on every weight."""

    batch_size: int
    gradient_checkpointing: bool
