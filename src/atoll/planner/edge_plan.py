"""What all edges are going to do, and what that costs: a plan as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from atoll.planner.fedpipe.explain import Binding, Price
from atoll.planner.frozen_delta import FrozenDelta
from atoll.planner.request import WarmUpPlan
from atoll.wire.byte_formulas import WireMode

Mode = Literal["local", "split", "cloud"]


@dataclass(frozen=True, slots=True)
class EdgePlan:
    """What one edge does in every round, or in those of one stage where adapters grow."""

    name: str
    mode: Mode
    bits: int
    """Bits per weight in the blocks of its copy of the base."""
    batch_size: int
    accumulate: int
    ranks: Mapping[str, int]
    """Rank by full module name."""
    num_steps: int
    """Optimizer steps per round."""
    gradient_checkpointing: bool
    predicted_peak_bytes: int
    """In the whole run: of its last round or, where adapters grow, of the stage that needs most."""
    predicted_seconds: float | None
    """Per round, with every row at full length and every token a label: an upper bound. None where no speed or link is declared.
    Where there is a frozen delta, that of the last round."""
    up_bytes: int
    """Per round, with every module active; rows that an edge uploads are not counted."""
    down_bytes: int
    """Per round; where there is a frozen delta, in the last one."""
    binding: Binding
    """The declared limits that decided something, if any did."""
    why: str
    objective: float | None = None
    """Worth of its ranks and bits, as a share of the largest on all unquantized weights; None where run.toml says the ranks."""
    prices: tuple[Price, ...] = ()
    """What more of a limit would buy."""
    under_training: float = 0.0
    """Share of a round's steps that it cannot finish by the deadline, by declared speed and link."""
    warm_up: WarmUpPlan | None = None
    """How it finds the importance of weights; None where it is not asked to, or has too little memory for it."""
    wire_mode: WireMode | None = None
    """How adapters travel; None where no blocks run in a host."""
    wire_why: str = ""
    """Why so: how long a step takes in each mode."""

    def to_json(self) -> dict[str, object]:
        """The fields as JSON values."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        nested = {"prices": [dataclasses.asdict(price) for price in self.prices]}
        nested["warm_up"] = None if self.warm_up is None else dataclasses.asdict(self.warm_up)  # type: ignore[assignment]
        return found | {"ranks": dict(self.ranks)} | nested


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An edge for which nothing fits, in a run that goes on without it."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What all edges do, and how often."""

    edges: tuple[EdgePlan, ...]
    rounds: int
    num_trainable: int
    """Numbers in the adapter that the edges share, at the largest rank of each module; where adapters grow, in the last stage."""
    num_parameters: int
    """Of the frozen base."""
    predicted_seconds: float | None
    """Of all rounds, without a warm-up: a round lasts as long as its slowest edge. None where an edge declares neither speed nor link."""
    up_bytes: int
    """Of all edges in the whole run, as of each in a round."""
    down_bytes: int
    left_out: tuple[LeftOut, ...] = ()
    importance: str | None = None
    """How the worth of weights was found; None where run.toml says the ranks."""
    pool: tuple[str, ...] = ()
    """Full names of all modules that may have an adapter."""
    remarks: tuple[str, ...] = ()
    """What targets and bits leave out of the base, in sentences."""
    notes: tuple[str, ...] = ()
    """What is to be told of the data, in sentences."""
    personal_steps: int | None = None
    """Of each edge's own copy after the last round, which moves no bytes to or from the coordinator and needs no more memory."""
    personal_seconds: float | None = None
    """Of these, on the slowest edge: part of `predicted_seconds`."""

    def edge(self, name: str) -> EdgePlan:
        """The plan of one edge, which must exist."""
        return next(edge for edge in self.edges if edge.name == name)

    @property
    def rows_per_step(self) -> dict[str, int]:
        """Of every edge."""
        return {edge.name: edge.batch_size * edge.accumulate for edge in self.edges}

    def to_json(self) -> dict[str, object]:
        """The fields as JSON values."""
        return {
            "rounds": self.rounds,
            "num_parameters": self.num_parameters,
            "num_trainable": self.num_trainable,
            "predicted_seconds": self.predicted_seconds,
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "importance": self.importance,
            "edges": [edge.to_json() for edge in self.edges],
            "left_out": [dataclasses.asdict(edge) for edge in self.left_out],
            "remarks": list(self.remarks),
            "notes": list(self.notes),
            "personal_steps": self.personal_steps,
            "personal_seconds": self.personal_seconds,
        }


@dataclass(frozen=True, slots=True)
class Span:
    """Rounds that follow each other, in which every edge does the same."""

    num_rounds: int
    plans: Sequence[EdgePlan]
    """With the costs of the last of them."""
    frozen_delta: FrozenDelta

    @property
    def seconds(self) -> float | None:
        """Of all these rounds, each as long as the slowest edge takes for the last; None where one's time is not known."""
        known = [plan.predicted_seconds for plan in self.plans if plan.predicted_seconds is not None]
        return self.num_rounds * max(known) if len(known) == len(self.plans) else None

    @property
    def up_bytes(self) -> int:
        """Of all edges in all these rounds."""
        return self.num_rounds * sum(plan.up_bytes for plan in self.plans)

    @property
    def down_bytes(self) -> int:
        """The same, to the edges."""
        # The frozen delta is not the same in every round; where rows are uploaded, nothing is sent.
        alike = [plan.down_bytes - self.frozen_delta.last_bytes for plan in self.plans if plan.mode != "cloud"]
        return self.num_rounds * sum(alike) + len(alike) * self.frozen_delta.down_bytes
