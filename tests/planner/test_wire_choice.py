"""How adapters travel where [wire] mode = "auto": the quickest mode over an edge's link, by formulas written down anew."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from atoll.config.schema import RunConfig
from atoll.cost.formulas import host_flops, step_flops
from atoll.errors import InfeasibleError
from atoll.planner.edge_plan import EdgePlan
from atoll.planner.plan_fleet import plan_fleet
from atoll.shapes import BaseShapes

from tests.planner.fedpipe.bases import base

MODES = ("dense", "factored", "lent")
SHAPES = base(6)
CUT = 1
"""Blocks in front, which the edge keeps."""
LINKS: dict[str, dict[str, Any]] = {
    "near": {"bandwidth": 1e10, "latency": 1e-4}, "house": {"bandwidth": 1e8, "latency": 0.02}, "far": {"bandwidth": 1e7, "latency": 0.2},
    "thin": {"bandwidth": 1e5, "latency": 0.0}, "not declared": {},
}  # fmt: skip


QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


def config(
    link: dict[str, Any], tokens: int, rank: int, accumulate: int = 1, targets: str | tuple[str, ...] = "all-linear", **wire: Any
) -> RunConfig:
    edge = {"name": "north", "mode": "split", **link}
    return RunConfig.model_validate({
        "model": {"cut": {"front": CUT, "back": 0}}, "data": {"max_length": tokens}, "adapter": {"targets": targets, "rank": rank},
        "train": {"batch_size": 1, "accumulate": accumulate, "local_steps": 2, "gradient_checkpointing": False},
        "wire": wire, "edge": (edge,),
    })  # fmt: skip


def planned(asked: RunConfig, shapes: BaseShapes = SHAPES) -> EdgePlan:
    return plan_fleet(asked, shapes, None).edges[0]


def seconds_of(asked: RunConfig, mode: str, shapes: BaseShapes = SHAPES) -> float:
    """A step by hand: everything in fp32, adapters of one rank on all modules, gradients on to the front block."""
    edge, n, rank, d = asked.edge[0], asked.data.max_length, asked.adapter.rank, shapes.d_model
    modules = [module for module in shapes.modules if module.block >= CUT]
    inputs = {(module.block, module.stage): module.d_in for module in modules}
    numbers = [(module.d_in, module.d_out) for module in modules]
    up, down = n * d + (n - 1) * d, (n - 1) * d + n * d
    once_up = once_down = 0
    trips = 2
    if mode == "lent":
        once_up = once_down = rank * sum(d_in + d_out for d_in, d_out in numbers)
    else:
        trips = 2 * len(inputs) + 2
        values = sum(d_out for _, d_out in numbers) if mode == "dense" else rank * len(numbers)
        up, down = up + n * (sum(inputs.values()) + values), down + n * (sum(inputs.values()) + values)
        factors = rank * sum(d_out for _, d_out in numbers) if mode == "factored" else 0
        # Gradients of B come back with every exchange.
        once_up, down = factors, down + factors
    times, ranks = asked.train.accumulate, {module.name: rank for module in shapes.modules}
    sizes = {"num_rows": 1, "row_tokens": n, "remote_blocks": range(CUT, shapes.num_blocks), "wire_mode": mode}
    work = times * step_flops(shapes, ranks, num_label_tokens=n - 1, **sizes).flops  # type: ignore[arg-type]
    there = times * host_flops(shapes, ranks, **sizes)  # type: ignore[arg-type]
    bandwidth, latency = edge.bandwidth or 100e6, 0.02 if edge.latency is None else edge.latency
    compute = (work / edge.flops if edge.flops else 0.0) + (there / asked.wire.host_flops if asked.wire.host_flops else 0.0)
    return compute + 32 * (times * (up + down) + once_up + once_down) / bandwidth + 2 * times * trips * latency


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("link", LINKS)
def test_the_mode_is_the_quickest_of_all_three(link: str, accumulate: int) -> None:
    found = set()
    for tokens, rank, speed, there in itertools.product((4, 64, 512), (1, 8, 32), (None, 1e8), (None, 1e9)):
        asked = config(LINKS[link] | {"flops": speed}, tokens, rank, accumulate, host_flops=there)
        seconds = {mode: seconds_of(asked, mode) for mode in MODES}
        plan = planned(asked)
        assert plan.wire_mode is not None
        assert seconds[plan.wire_mode] <= min(seconds.values()) * (1 + 1e-12), (tokens, rank, speed, there, seconds)
        found.add(plan.wire_mode)
    assert len(found) > (link == "thin"), "bytes alone decide: not always for the same"


@pytest.mark.parametrize(("tokens", "mode"), [(4, "dense"), (12, "factored"), (64, "lent")])
def test_with_few_tokens_and_many_adapters_factored_wins(tokens: int, mode: str) -> None:
    """Lent sends r numbers of A for n of the x that three modules share, and dense n numbers of each output for r of B."""
    assert planned(config(LINKS["thin"], tokens, 8, targets=QUERY_KEY_VALUE)).wire_mode == mode


def test_the_plan_says_why_with_the_numbers_that_decide() -> None:
    plan = planned(config({}, 64, 8))
    lent, dense, factored = (seconds_of(config({}, 64, 8), mode) for mode in ("lent", "dense", "factored"))
    assert plan.wire_why.startswith(f"lent: {1000 * lent:.0f} ms a step over 100 Mbit/s and 20 ms, as it declares no link, (")
    assert f"factored {factored:.1f} s (" in plan.wire_why
    assert f"dense {dense:.1f} s (" in plan.wire_why
    assert plan.why.endswith(f"; wire {plan.wire_why}")
    half = planned(config({"bandwidth": 1e6}, 64, 8)).wire_why
    assert "over 1 Mbit/s and 20 ms, as it declares no latency, (" in half
    slowed = planned(config({}, 64, 8, link_bandwidth=1e6, link_latency=0.25)).wire_why
    assert "over 1 Mbit/s and 250 ms (" in slowed


def test_what_run_toml_says_is_kept_and_an_edge_without_a_host_has_none() -> None:
    for mode in MODES:
        plan = planned(config(LINKS["far"], 64, 8, mode=mode))
        assert (plan.wire_mode, plan.wire_why) == (mode, f"{mode}, as run.toml says")
    plan = planned(config({"mode": "local"}, 64, 8))
    assert (plan.wire_mode, plan.wire_why) == (None, "")


def test_time_and_bytes_of_a_plan_are_those_of_its_mode() -> None:
    speed = {"flops": 1e9}
    for link in ("house", "far", "thin"):
        auto = planned(config(LINKS[link] | speed, 64, 8, host_flops=2e9))
        (said,) = [planned(config(LINKS[link] | speed, 64, 8, host_flops=2e9, mode=auto.wire_mode))]
        assert (auto.up_bytes, auto.down_bytes, auto.predicted_seconds) == (said.up_bytes, said.down_bytes, said.predicted_seconds)
        without = planned(config(LINKS[link] | speed, 64, 8, mode=auto.wire_mode)).predicted_seconds
        ranks = {module.name: 8 for module in SHAPES.modules}
        there = host_flops(SHAPES, ranks, num_rows=1, row_tokens=64, remote_blocks=range(CUT, 6), wire_mode=auto.wire_mode)  # type: ignore[arg-type]
        assert without is not None
        assert auto.predicted_seconds == pytest.approx(without + 2 * there / 2e9)


def test_no_edge_is_left_out_for_a_mode_that_is_quick_over_a_link_that_it_does_not_declare() -> None:
    """By declared speed alone lent is the quickest: the device computes no adapters."""
    asked = config({"flops": 1e9}, 12, 8, targets=QUERY_KEY_VALUE, link_bandwidth=1e5)
    assert planned(asked).wire_mode == "factored"
    only_lent = planned(config({"flops": 1e9}, 12, 8, targets=QUERY_KEY_VALUE, mode="lent")).predicted_seconds
    assert only_lent is not None
    late = asked.model_copy(update={"plan": asked.plan.model_copy(update={"round_deadline": only_lent})})
    cut = late.model_copy(update={"federated": late.federated.model_copy(update={"late": "cut"})})
    assert planned(cut).wire_mode == "lent"
    with pytest.raises(InfeasibleError):
        planned(cut.model_copy(update={"plan": asked.plan.model_copy(update={"round_deadline": only_lent / 100})}))
