"""What every edge is going to do, decided from configuration and shapes alone: scores and sizes in, a plan out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from atoll.adapters.targets import resolve_targets
from atoll.config.schema import DEFAULT_LOCAL_STEPS, Edge, RunConfig
from atoll.cost.formulas import adapter_parameters, adapter_payload_bytes, round_seconds, step_flops
from atoll.selection.fit import Setting, largest_batch, refuse
from atoll.selection.split import elsewhere, step_bytes, step_round_trips
from atoll.shapes import BaseShapes
from atoll.units import format_bytes

LOCAL_EDGE = "local"
"""The one edge of a run without [[edge]]."""
BITS = {"fp32": 32, "bf16": 16}

Mode = Literal["local", "split", "cloud"]
Binding = Literal["none", "memory"]


@dataclass(frozen=True, slots=True)
class EdgePlan:
    """What one edge does in every round."""

    name: str
    mode: Mode
    bits: int
    """Bits per weight of its copy of the base."""
    batch_size: int
    accumulate: int
    ranks: Mapping[str, int]
    """Rank by full module name."""
    num_steps: int
    """Optimizer steps per round."""
    gradient_checkpointing: bool
    predicted_peak_bytes: int
    predicted_seconds: float | None
    """Per round, with every row at full length and every token a label: an upper bound. None where no speed or link is declared."""
    up_bytes: int
    """Per round, with every module active; rows that an edge hands over are not counted."""
    down_bytes: int
    """Per round."""
    binding: Binding
    """The declared limit that decided something, if one did."""
    why: str

    def to_json(self) -> dict[str, object]:
        """The fields as JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {"ranks": dict(self.ranks)}


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What all edges do, and how often."""

    edges: tuple[EdgePlan, ...]
    rounds: int
    num_trainable: int
    """Numbers in the adapter that the edges share, at the largest rank of each module."""
    num_parameters: int
    """Of the frozen base."""

    def edge(self, name: str) -> EdgePlan:
        """The plan of one edge, which must exist."""
        return next(edge for edge in self.edges if edge.name == name)

    @property
    def predicted_seconds(self) -> float | None:
        """Of the whole run: a round lasts as long as its slowest edge. None where an edge declares neither speed nor link."""
        known = [edge.predicted_seconds for edge in self.edges if edge.predicted_seconds is not None]
        return self.rounds * max(known) if len(known) == len(self.edges) else None

    def to_json(self) -> dict[str, object]:
        """The fields as JSON values."""
        return {
            "rounds": self.rounds,
            "num_parameters": self.num_parameters,
            "num_trainable": self.num_trainable,
            "predicted_seconds": self.predicted_seconds,
            "up_bytes": self.rounds * sum(edge.up_bytes for edge in self.edges),
            "down_bytes": self.rounds * sum(edge.down_bytes for edge in self.edges),
            "edges": [edge.to_json() for edge in self.edges],
        }


def plan_fleet(
    config: RunConfig, shapes: BaseShapes, edges_rows: Mapping[str, int] | None, *, start_ranks: Mapping[str, int] | None = None,
    has_host: bool = False,
) -> FleetPlan:  # fmt: skip
    """The plan of every edge, in the order of the configuration. Where there is a host, mode = "auto" means split.

    `edges_rows` counts each edge's rows and is needed for local_epochs only; `start_ranks` are those of [adapter] start, which hold for
    all edges but those that name a rank of their own.

    Raises: TargetError; InfeasibleError naming every edge whose declared memory is too small, with what is missing and what would fit.
    """
    names = tuple(start_ranks) if start_ranks is not None else resolve_targets(config.adapter.targets, shapes.modules)
    edges = config.edge or (Edge(name=LOCAL_EDGE),)
    edges = tuple(_placed(edge, config.run.placement, has_host) for edge in edges)
    settings = [_setting(config, shapes, edge, {name: _rank(config, edge, name, start_ranks) for name in names}) for edge in edges]
    refuse([(edge.name, edge.memory, setting) for edge, setting in zip(edges, settings, strict=True) if edge.memory is not None])
    plans = tuple(_edge_plan(config, edge, setting, edges_rows) for edge, setting in zip(edges, settings, strict=True))
    largest = {name: max(plan.ranks[name] for plan in plans) for name in names}
    return FleetPlan(plans, config.run.rounds, adapter_parameters(shapes, largest), shapes.num_parameters)


def steps_per_round(config: RunConfig, num_rows: int | None) -> int:
    """Optimizer steps of one edge in one round: local_steps, or local_epochs over its rows, at least one."""
    if config.train.local_epochs is None:
        return config.train.local_steps or DEFAULT_LOCAL_STEPS
    assert num_rows is not None, "local_epochs needs the edge's number of rows"
    return max(1, math.ceil(config.train.local_epochs * num_rows / (config.train.batch_size * config.train.accumulate)))


def _placed(edge: Edge, placement: Literal["auto"] | Mode, has_host: bool) -> Edge:
    """The edge with a mode that is not "auto"; of one that trains nothing itself, no limit counts."""
    asked = placement if edge.mode == "auto" else edge.mode
    by_itself: Mode = "split" if has_host else "local"
    mode: Mode = by_itself if asked == "auto" else asked
    limits = {"memory": None, "flops": None, "bandwidth": None, "latency": None} if mode == "cloud" else {}
    return edge.model_copy(update={"mode": mode, **limits})


def _rank(config: RunConfig, edge: Edge, name: str, start_ranks: Mapping[str, int] | None) -> int:
    if edge.rank is not None:
        return edge.rank
    return config.adapter.rank if start_ranks is None else start_ranks[name]


def _setting(config: RunConfig, shapes: BaseShapes, edge: Edge, ranks: Mapping[str, int]) -> Setting:
    """What the configuration asks of this edge; checkpointing comes on by itself where declared memory needs it."""
    row_tokens = min(config.data.max_length, shapes.max_positions or config.data.max_length)
    asked = config.train.gradient_checkpointing
    there = elsewhere(config, shapes) if edge.mode == "split" else range(0)
    merges = config.select.policy != "all" and config.select.killed == "merge"
    setting = Setting(
        shapes, ranks, BITS[config.model.precision], config.train.batch_size, row_tokens, asked is True, there, ranks if merges else ()
    )
    too_large = edge.memory is not None and setting.peak_bytes > edge.memory
    return dataclasses.replace(setting, gradient_checkpointing=True) if asked == "auto" and too_large else setting


def _edge_plan(config: RunConfig, edge: Edge, setting: Setting, edges_rows: Mapping[str, int] | None) -> EdgePlan:
    num_steps = steps_per_round(config, edges_rows[edge.name] if edges_rows is not None else None)
    payload_bytes, split = adapter_payload_bytes(setting.shapes, setting.ranks), edge.mode == "split"
    wire = step_bytes(
        config, setting.shapes, setting.ranks, num_tokens=setting.batch_size * setting.row_tokens,
        num_label_tokens=setting.num_label_tokens,
    ).times(num_steps * config.train.accumulate if split else 0)  # fmt: skip
    trips = step_round_trips(config, setting.shapes, setting.ranks, num_exchanges=config.train.accumulate) if split else 0
    flops = step_flops(
        setting.shapes, setting.ranks, num_rows=setting.batch_size, row_tokens=setting.row_tokens,
        num_label_tokens=setting.num_label_tokens, gradient_checkpointing=setting.gradient_checkpointing,
        elsewhere=setting.elsewhere, factored=config.wire.mode == "factored",
    ).times(num_steps * config.train.accumulate)  # fmt: skip
    seconds = round_seconds(
        flops.flops, 2 * payload_bytes + wire.shared_bytes, flops_per_second=edge.flops, bits_per_second=edge.bandwidth,
        latency_seconds=edge.latency, round_trips=1 + num_steps * trips,
    )  # fmt: skip
    if edge.mode == "cloud":
        return EdgePlan(
            edge.name, "cloud", setting.bits, setting.batch_size, config.train.accumulate, setting.ranks, num_steps,
            setting.gradient_checkpointing, 0, None, 0, 0, "none", "for comparison: its rows leave it (not counted here)",
        )  # fmt: skip
    by_itself = setting.gradient_checkpointing and config.train.gradient_checkpointing == "auto"
    return EdgePlan(
        name=edge.name, mode="split" if split else "local", bits=setting.bits, batch_size=setting.batch_size,
        accumulate=config.train.accumulate, ranks=setting.ranks, num_steps=num_steps, gradient_checkpointing=setting.gradient_checkpointing,
        predicted_peak_bytes=setting.peak_bytes, predicted_seconds=seconds,
        up_bytes=payload_bytes + wire.up_bytes, down_bytes=payload_bytes + wire.down_bytes,
        binding="memory" if by_itself else "none", why=_why(setting, edge.memory, by_itself),
    )  # fmt: skip


def _why(setting: Setting, memory_bytes: int | None, by_itself: bool) -> str:
    ranks = sorted(set(setting.ranks.values()))
    where = f"blocks {setting.elsewhere.start} to {setting.elsewhere.stop - 1} in the host; " if setting.elsewhere else ""
    batch = f"{setting.batch_size} x {setting.row_tokens} tokens"
    what = f"{where}rank {_span(ranks)} on {len(setting.ranks)} modules, {batch}, as run.toml says"
    if memory_bytes is None:
        return f"{what}; no memory is declared, so that none is a limit"
    if by_itself:
        plain = dataclasses.replace(setting, gradient_checkpointing=False)
        return (
            f"{what}; gradient checkpointing is on, because without it {format_bytes(plain.peak_bytes)} would be needed"
            f" and {format_bytes(memory_bytes)} are declared; {format_bytes(plain.peak_bytes - memory_bytes)} more would switch it off"
        )
    spare = f"{what}; {format_bytes(memory_bytes - setting.peak_bytes)} of the declared memory are left"
    larger = largest_batch(setting, memory_bytes)
    return f"{spare}, enough for batch_size = {larger}" if larger > setting.batch_size else spare


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
