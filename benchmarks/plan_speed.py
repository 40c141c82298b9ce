"""How long it takes to plan a fleet of 100 edges, no two alike, on a base with 200 weights that may have an adapter.

The base is Llama's shape in little: 50 blocks, query, key, value and output projection. Every edge declares a memory, a speed and a link of
its own, drawn so that most cannot hold or train everything; the importance of weights is lognormal, or equal. Planned are mode, bits, batch
and ranks of every edge, with prices, reasons and a deadline.

Usage: python benchmarks/plan_speed.py [--edges 100] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from atoll.config.schema import RunConfig
from atoll.planner.edge_plan import FleetPlan
from atoll.planner.importance import Importance
from atoll.planner.plan_fleet import plan_fleet
from atoll.shapes import BaseShapes, ModuleShape
from sides import results

BLOCKS, WIDTH = 50, 1024
PARTS = (("q_proj", WIDTH, WIDTH), ("k_proj", WIDTH, WIDTH // 2), ("v_proj", WIDTH, WIDTH // 2), ("o_proj", WIDTH, WIDTH))
FLEETS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "local, memory and deadline": ("local", True, {}),
    "local, memory alone": ("local", True, {"round_deadline": None}),
    "local, equal importance": ("local", False, {}),
    "local or in a host": ("auto", True, {}),
}
"""By name: placement, whether importance differs, keys of [plan]."""


def base() -> BaseShapes:
    """Fifty blocks with four projections each."""
    modules = tuple(
        ModuleShape(f"model.layers.{block}.self_attn.{name}", d_in, d_out, "attention", block)
        for block in range(BLOCKS) for name, d_in, d_out in PARTS
    )  # fmt: skip
    weights = sum(module.num_weights for module in modules) + 8192 * WIDTH
    return BaseShapes("llama", weights, modules, WIDTH, 8192, BLOCKS, 2048, True, 2.0, 8, WIDTH, False)


def fleet(num_edges: int, placement: str, keys: dict[str, Any], seed: int) -> RunConfig:
    """Edges of 0.68 to 1.1 GB, 0.2 to 1 TFLOP/s and 50 to 200 Mbit/s."""
    random = np.random.default_rng(seed)
    edges = tuple(
        {
            "name": f"edge-{number}", "memory": int(random.uniform(0.68e9, 1.1e9)), "flops": float(random.uniform(0.2e12, 1e12)),
            "bandwidth": float(random.uniform(50e6, 200e6)), "latency": float(random.uniform(0.005, 0.05)),
        }
        for number in range(num_edges)
    )  # fmt: skip
    plan = {"policy": "fedpipe", "infeasible": "leave-out", "round_deadline": 30.0} | keys
    sections = {"data": {"max_length": 128}, "train": {"local_steps": 20}, "model": {"precision": "bf16", "quantize": "auto"}}
    return RunConfig.model_validate({**sections, "edge": edges, "plan": plan, "run": {"placement": placement}})


def planned(name: str, num_edges: int, seed: int) -> tuple[FleetPlan, float, float]:
    """The plan, and the seconds and processor seconds that it took."""
    placement, differs, keys = FLEETS[name]
    shapes = base()
    worth = np.random.default_rng(seed).lognormal(size=len(shapes.modules)) if differs else np.ones(len(shapes.modules))
    importance = Importance("svd-sensitivity", dict(zip((m.name for m in shapes.modules), worth.tolist(), strict=True)), {})
    config = fleet(num_edges, placement, keys, seed)
    wall, processor = time.perf_counter(), time.process_time()
    plan = plan_fleet(config, shapes, None, importance=importance)
    return plan, time.perf_counter() - wall, time.process_time() - processor


def summary(plan: FleetPlan) -> dict[str, Any]:
    """What was decided, in numbers."""
    places = [f"{edge.mode}, {edge.bits} bits" for edge in plan.edges]
    return {
        "places": {place: places.count(place) for place in sorted(set(places))}, "left_out": len(plan.left_out),
        "bound": {bound: sum(edge.binding == bound for edge in plan.edges) for bound in sorted({edge.binding for edge in plan.edges})},
        "median_objective": round(statistics.median(edge.objective or 0.0 for edge in plan.edges), 4) if plan.edges else None,
    }  # fmt: skip


def main() -> None:
    """Plan every fleet some times, each time another one, and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for name in FLEETS:
        runs = [planned(name, arguments.edges, seed) for seed in range(arguments.repeats)]
        seconds, processor = [round(wall, 3) for _, wall, _ in runs], [round(time, 3) for *_, time in runs]
        rows.append({"fleet": name, "seconds": seconds, "processor_seconds": processor, **summary(runs[0][0])})
        print(f"{name}: {statistics.median(seconds):.1f} s ({statistics.median(processor):.1f} s of processor time) {rows[-1]}")
    config = {"edges": arguments.edges, "weights": len(base().modules), "repeats": arguments.repeats, "goal_seconds": 10}
    results.write("plan_speed", config, {"rows": rows})


if __name__ == "__main__":
    main()
