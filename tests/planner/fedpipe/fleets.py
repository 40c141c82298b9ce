"""Plans of small fleets for the planner's tests, and the best plan of an edge by trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from atoll.config.schema import RunConfig
from atoll.cost.split_traffic import remote_blocks
from atoll.planner.costs import Costs, costs_of
from atoll.planner.edge_plan import EdgePlan, FleetPlan
from atoll.planner.feasibility import Setting
from atoll.planner.importance import Importance
from atoll.planner.plan_fleet import plan_fleet
from atoll.shapes import BaseShapes
from atoll.wire.byte_formulas import WireMode

from tests.planner.fedpipe.bases import base

TARGETS = ("q_proj", "o_proj")
RANKS, BATCHES = (1, 4), (1, 2, 4)
SHAPES = base(2)
"""With TARGETS, two weights a block."""


def config(edges: Sequence[Mapping[str, Any]], plan: Mapping[str, Any] = {}, **sections: Mapping[str, Any]) -> RunConfig:
    plan = {"policy": "fedpipe", "ranks": RANKS, "batch_sizes": BATCHES, **plan}
    model = {"cut": {"front": 0, "back": 0}, **sections.get("model", {})}
    rest = {
        "data": {"max_length": 32}, "adapter": {"targets": TARGETS}, "train": {"batch_size": 4, "local_steps": 3},
        "run": {"placement": "auto"},
    }  # fmt: skip
    named = tuple({"name": f"edge-{number}", "process_memory": 0, **edge} for number, edge in enumerate(edges))
    return RunConfig.model_validate({**rest, **sections, "model": model, "plan": plan, "edge": named})


def scores(shapes: BaseShapes, seed: int) -> dict[str, float]:
    values = np.random.default_rng(seed).lognormal(size=len(shapes.modules)).tolist()
    return dict(zip((module.name for module in shapes.modules), values, strict=True))


def planned(config: RunConfig, shapes: BaseShapes = SHAPES, seed: int = 0) -> FleetPlan:
    return plan_fleet(config, shapes, None, importance=Importance("svd-sensitivity", scores(shapes, seed), {}))


def setting(
    config: RunConfig, shapes: BaseShapes, mode: str, bits: int, ranks: Mapping[str, int], batch_size: int, checkpointing: bool
) -> Setting:
    """What an edge with a declared process of nothing would do, put together anew."""
    there = remote_blocks(config, shapes) if mode == "split" else range(0)
    merged = {m.name for m in shapes.modules if m.last_name in config.adapter.targets} if config.select.killed == "merge" else ()
    precision_bytes = 2 if config.model.precision == "bf16" else 4
    return Setting(
        shapes, ranks, bits, batch_size, config.data.max_length, checkpointing, there, merged, 0, precision_bytes, holds_all=False
    )  # fmt: skip


def costs(config: RunConfig, one: Setting, mode: str, wire_mode: WireMode = "dense") -> Costs:
    rows = config.train.batch_size * config.train.accumulate
    return costs_of(config, one, accumulate=math.ceil(rows / one.batch_size), wire_mode=wire_mode if mode == "split" else None)


def keeps_limits(config: RunConfig, one: Setting, mode: str, wire_mode: WireMode = "dense", number: int = 0) -> bool:
    edge = config.edge[number]
    if edge.memory is not None and one.peak_bytes > edge.memory:
        return False
    seconds = costs(config, one, mode, wire_mode).round_seconds(edge, config.train.local_steps or 0)
    return config.plan.round_deadline is None or seconds is None or seconds <= config.plan.round_deadline * (1 + 1e-12)


def choices(names: Sequence[str], ranks: Sequence[int]) -> Iterator[dict[str, int]]:
    for combination in itertools.product((0, *ranks), repeat=len(names)):
        if any(combination):
            yield {name: rank for name, rank in zip(names, combination, strict=True) if rank}


def by_trying_everything(config: RunConfig, shapes: BaseShapes, seed: int) -> tuple[str, int, float] | None:
    """Mode, bits and objective of the best plan of the first edge."""
    worth = {name: score for name, score in scores(shapes, seed).items() if name.rpartition(".")[2] in TARGETS}
    whole = sum(worth.values()) * math.log1p(max(config.plan.ranks))
    found, best = None, 0.0
    hosts: list[tuple[str, int, float, WireMode]] = [("split", 32, 0.999, mode) for mode in ("dense", "factored", "lent")]
    places: list[tuple[str, int, float, WireMode]] = [
        ("local", 16, 1.0, "dense"), ("local", 8, 0.9994, "dense"), ("local", 4, 0.913, "dense"),
    ]  # fmt: skip
    for mode, bits, fidelity, wire_mode in places + hosts:
        lowest = 0 if config.plan.depth == "all" else shapes.num_blocks - int(config.plan.depth)
        for ranks in choices([name for name in worth if int(name.split(".")[2]) >= lowest], config.plan.ranks):
            objective = fidelity * sum(worth[name] * math.log1p(rank) for name, rank in ranks.items()) / whole
            sizes = itertools.product((False, True), BATCHES)
            if objective > best and any(
                keeps_limits(config, setting(config, shapes, mode, bits, ranks, batch, again), mode, wire_mode) for again, batch in sizes
            ):
                found, best = (mode, bits, objective), objective
    return found


def best_size(config: RunConfig, shapes: BaseShapes, plan: EdgePlan, wire_mode: WireMode) -> tuple[bool, int]:
    """Checkpointing and rows for a plan's ranks: no checkpointing if that can be, then the most rows."""
    sizes = itertools.product((False, True), sorted(BATCHES, reverse=True))
    return next(
        (again, batch) for again, batch in sizes
        if keeps_limits(config, setting(config, shapes, plan.mode, plan.bits, plan.ranks, batch, again), plan.mode, wire_mode)
    )  # fmt: skip
