"""FedAdapter: adapters that grow in depth and width, and change nothing by growing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import atoll
from atoll.adapters.attach import attached
from atoll.adapters.state import AdapterState
from atoll.base.head import loss_sum
from atoll.config.schema import Federated, RunConfig
from atoll.cost.formulas import message_bytes
from atoll.errors import InfeasibleError
from atoll.jobs.job import Job, grown_to, prepare
from atoll.jobs.rounds import Rounds
from atoll.planner.fedadapter import growth_stage_after, growth_stages
from atoll.planner.plan_fleet import plan_fleet
from atoll.runs.events import EventLog

from tests.jobs.conftest import Workplace
from tests.planner.test_plan import BASE, MODULES, NUM_BLOCKS

EDGES: dict[str, dict[str, object]] = {"north": {}, "south": {}}


def sections(kind: str = "lora", ranks: tuple[int, ...] = (2, 4), rounds: int = 4, **plan: object) -> dict[str, dict[str, object]]:
    return {"run": {"rounds": rounds}, "adapter": {"kind": kind}, "plan": {"policy": "fedadapter", "ranks": list(ranks), **plan}}


def growing(ranks: tuple[int, ...], rounds: int, **edge: object) -> RunConfig:
    return RunConfig.model_validate({
        "run": {"rounds": rounds}, "plan": {"policy": "fedadapter", "ranks": ranks}, "edge": ({"name": "north", **edge},),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("rounds", "ranks", "starts"), [(4, (2, 4), [0, 2]), (5, (2, 4), [0, 2]), (10, (1, 2, 3, 4), [0, 2, 5, 7]), (3, (8, 8, 8), [0, 1, 2])]
)
def test_rounds_are_divided_evenly_over_stages(rounds: int, ranks: tuple[int, ...], starts: list[int]) -> None:
    stages = growth_stages(growing(ranks, rounds))
    assert [stage.first_round for stage in stages] == starts
    assert [stage.rank for stage in stages] == list(ranks)
    assert sum(stage.num_rounds for stage in stages) == rounds
    assert max(stage.num_rounds for stage in stages) - min(stage.num_rounds for stage in stages) <= 1
    by_round = [growth_stage_after(growing(ranks, rounds), done).number for done in range(rounds)]
    assert by_round == [stage.number for stage in stages for _ in range(stage.num_rounds)]


def test_a_stage_has_its_share_of_the_blocks_from_the_top_at_its_rank() -> None:
    config = growing((2, 4, 8, 16, 16), 10)
    for done in range(10):
        stage = growth_stage_after(config, done)
        (edge,) = plan_fleet(config, BASE, None, rounds_done=done).edges
        lowest = NUM_BLOCKS - -(-NUM_BLOCKS * stage.number // 5)
        assert edge.ranks == {module.name: stage.rank for module in MODULES if module.block >= lowest}
        first = stage.first_round + 1
        assert edge.why.startswith(f"stage {stage.number} of 5 (rounds {first} to {stage.first_round + stage.num_rounds}); ")
        assert ("; memory is that of stage 5: rank 16 on 120 modules" in edge.why) == (stage.number < 5)
    assert len(edge.ranks) == len(MODULES)


def test_costs_follow_the_stages() -> None:
    config = growing((2, 4, 8, 16), 4, flops=1e12, bandwidth=1e6)
    plans = [plan_fleet(config, BASE, None, rounds_done=done) for done in range(4)]
    for cost in ("up_bytes", "down_bytes", "predicted_seconds"):
        costs = [getattr(plan.edges[0], cost) for plan in plans]
        assert costs == sorted(costs)
        assert costs[0] < 0.7 * costs[-1]
    assert plans[-1].edges[0].up_bytes == 4 * plans[-1].num_trainable


PER_RANK = 2 * (512 + 512) + 3 * (512 + 1376)
"""Numbers of adapters of rank 1 on one block of BASE."""


def test_what_a_run_costs_is_the_sum_over_its_stages_by_hand() -> None:
    """Two rounds of rank 2 on the upper half of the blocks, three of rank 4 on all; only links are declared."""
    config = growing((2, 4), 5, bandwidth=1e6)
    per_stage = [4 * 2 * PER_RANK * 12, 4 * 4 * PER_RANK * 24]
    alone = [plan_fleet(_alone(rank), BASE, None).edges[0].predicted_peak_bytes for rank in (2, 4)]
    for done, stage in ((0, 0), (1, 0), (2, 1), (4, 1)):
        plan = plan_fleet(config, BASE, None, rounds_done=done)
        assert plan.up_bytes == plan.down_bytes == plan.to_json()["up_bytes"] == 2 * per_stage[0] + 3 * per_stage[1]
        wrapped = [2 * message_bytes(BASE, len(MODULES) // 2 * (1 + number)) + message_bytes(BASE, 0) for number in range(2)]
        assert plan.predicted_seconds == pytest.approx(8 * (2 * plan.up_bytes + 2 * wrapped[0] + 3 * wrapped[1]) / 1e6)
        assert plan.num_trainable == 4 * PER_RANK * 24
        (edge,) = plan.edges
        assert (edge.up_bytes, edge.down_bytes) == (per_stage[stage],) * 2
        assert edge.predicted_seconds == pytest.approx(8 * (2 * per_stage[stage] + wrapped[stage]) / 1e6)
        assert edge.predicted_peak_bytes == alone[1] > alone[0]


def _alone(rank: int) -> RunConfig:
    return RunConfig.model_validate({"adapter": {"rank": rank}, "edge": ({"name": "north"},)})


def test_the_frozen_delta_comes_from_all_stages_before_by_hand() -> None:
    """Alone, an edge adds its own rank by stack: nothing, 2, then 4 and 8 and 12 on the upper half, and 0, 4 and 8 on the lower."""
    config = growing((2, 4), 5).model_copy(update={"federated": Federated(aggregation="stack")})
    plan = plan_fleet(config, BASE, None)
    half = 4 * 12 * PER_RANK
    assert plan.down_bytes - plan.up_bytes == half * (0 + 2 + 4 + 8 + 12 + 0 + 4 + 8)
    assert plan.edges[0].down_bytes - plan.edges[0].up_bytes == half * 2
    last = plan_fleet(config, BASE, None, rounds_done=2).edges[0]
    assert last.down_bytes - last.up_bytes == half * (12 + 8)


def test_an_edge_that_cannot_hold_the_last_stage_takes_part_in_none() -> None:
    first, last = (plan_fleet(_alone(rank), BASE, None).edges[0].predicted_peak_bytes for rank in (2, 64))
    between = growing((2, 64), 2, memory=(first + last) // 2)
    fixed = between.model_copy(update={"train": between.train.model_copy(update={"gradient_checkpointing": False})})
    for done in (0, 1):
        with pytest.raises(InfeasibleError):
            plan_fleet(fixed, BASE, None, rounds_done=done)


def loss_of(job: Job, state: AdapterState) -> float:
    """Summed over one batch, with this adapter."""
    batch = job.edges[0].batches.batch(0)
    with torch.no_grad(), attached(job.base.model, state):
        return float(loss_sum(job.base.model, batch))


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_growing_changes_no_loss(place: Workplace, kind: str) -> None:
    """Before and after: the common adapter, and what an edge is sent of it."""
    job = prepare(place.config(EDGES, sections(kind)))
    sent: list[AdapterState] = []
    with Rounds(job, job.edges, "federated", EventLog(None)) as rounds:
        rounds.run(2)
        before, old = loss_of(job, rounds.state), rounds.state
        assert abs(before - loss_of(job, AdapterState(kind, {}))) > 1e-3, "something was learned"  # type: ignore[arg-type]
        grown = grown_to(job, 2)
        rounds.replan(grown, grown.edges)
        assert loss_of(job, rounds.state) == pytest.approx(before, rel=1e-6)
        strategy = rounds._strategy
        for message in strategy.configure_train(1, strategy.arrays(), _config(), rounds._backend.grid):
            sent.append(_adapter(message))
        rounds.run(2)
        assert rounds.num_done == 4
        assert loss_of(job, rounds.state) != before
    for state in sent:
        assert set(state.ranks.values()) == {4}
        assert len(state.modules) == 2 * len(old.modules) == 8
        assert loss_of(job, state) == pytest.approx(before, rel=1e-6)
        assert all(one.down_RI.abs().sum(1).min() > 0 for one in state.modules.values()), "a row of zeros could never be trained"
        fresh = [one for name, one in state.modules.items() if name not in old.modules]
        assert not any(one.up_OR.any() for one in fresh)
    if kind == "bottleneck":
        for name, one in old.modules.items():
            wide = sent[0].modules[name]
            assert torch.equal(wide.down_RI[:2], one.down_RI)
            torch.testing.assert_close(wide.up_OR[:, :2] * wide.scaling, one.up_OR * one.scaling)
            assert not wide.up_OR[:, 2:].any()
    job.close()


def _config() -> Any:
    from atoll.federated.flower import ConfigRecord

    return ConfigRecord({})


def _adapter(message: Any) -> AdapterState:
    from atoll.federated.payload import get_adapter

    return get_adapter(message.content)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("aggregation", ["exact-svd", "zero-pad"])
def test_a_run_grows_as_planned_and_learns(place: Workplace, kind: str, aggregation: str) -> None:
    done = place.train(EDGES, {**sections(kind), "federated": {"aggregation": aggregation}})
    sizes = {event["round"]: event["up_bytes"] for event in done.events("edge_finished") if event["edge"] == "north"}
    assert sizes[1] == pytest.approx(sizes[2], rel=0.1), "the first round carries the counted step besides"
    assert sizes[4] == sizes[3] > 2 * sizes[2]  # type: ignore[operator]
    assert [event["round"] for event in done.events("round_finished")] == [1, 2, 3, 4]
    summary = done.result.summary
    assert all(set(edge.ranks.values()) == {4} and len(edge.ranks) == 8 and edge.steps == 8 for edge in summary.edges)
    assert summary.eval.base is not None
    assert summary.eval.adapted is not None
    assert summary.eval.adapted["loss"] < summary.eval.base["loss"]  # type: ignore[operator]
    assert all(edge["why"].startswith("stage 2 of 2") for edge in done.plan["edges"])  # type: ignore[attr-defined]
    assert not (done.result.run_dir / "importance.json").exists()
    checkpoints = done.result.run_dir / "checkpoints"
    widths = [json.loads((checkpoints / f"round-000{number}" / "manifest.json").read_text()) for number in (1, 4)]
    assert widths[0] != widths[1]


@pytest.mark.parametrize("aggregation", ["stack", "residual"])
def test_the_frozen_delta_stays_when_adapters_grow(place: Workplace, aggregation: str) -> None:
    done = place.train(EDGES, {**sections(), "federated": {"aggregation": aggregation}})
    losses = [event["loss"] for event in done.events("step_done")]
    assert losses[-1] < losses[0]  # type: ignore[operator]


def test_growing_in_depth_alone_keeps_the_moments_of_what_was_there(place: Workplace) -> None:
    job = prepare(place.config({"north": {}}, sections(ranks=(4, 4))))
    with Rounds(job, job.edges, "federated", EventLog(None)) as rounds:
        rounds.run(2)
        old = rounds.state
        grown = grown_to(job, 2)
        rounds.replan(grown, grown.edges)
        from tests.jobs.test_federation import statistics

        watched = statistics(rounds)["north"]
        rounds.run(1)
    (given,) = watched.given
    assert set(given.optimizer) == set(old.modules)
    assert {moments.num_steps for moments in given.optimizer.values()} == {4}
    assert all(torch.equal(given.adapter.modules[name].up_OR, one.up_OR) for name, one in old.modules.items())
    job.close()


def test_the_plan_command_shows_the_first_stage(place: Workplace) -> None:
    plan = atoll.plan(place.config(EDGES, sections(ranks=(2, 4, 8))))
    assert all(edge.why.startswith("stage 1 of 3 (round 1); rank 2 on 4 modules") for edge in plan.edges)
    assert all("; memory is that of stage 3: rank 8 on 8 modules" in edge.why for edge in plan.edges)
