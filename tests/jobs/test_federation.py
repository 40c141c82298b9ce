"""Plans that change on the way, and whole federations by [plan], [federated] and [run] compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import atoll
from atoll.config.schema import Edge, RunConfig
from atoll.errors import InfeasibleError, RunFolderError
from atoll.jobs.job import Job, prepare, replanned
from atoll.jobs.rounds import Rounds
from atoll.planner.edge_plan import FleetPlan
from atoll.planner.fedpipe.search import EdgeSearch
from atoll.planner.importance import Importance
from atoll.planner.plan_fleet import plan_fleet
from atoll.runs.events import EventLog
from atoll.training.trainer import Batches, FitPlan, StepReport, Trainer, TrainState, Update

from tests.jobs.conftest import Done, Workplace
from tests.planner.test_plan import BASE

ALONE: dict[str, dict[str, object]] = {"north": {}}
PLANNER = {"policy": "fedpipe", "warmup_steps": 2, "ranks": [4], "bits": [16]}


class Watched:
    """A trainer that keeps what it was given and what it gave."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.given: list[TrainState] = []
        self.gave: list[Update] = []

    def fit(self, state: TrainState, batches: Batches, plan: FitPlan, on_step: Callable[[StepReport], None]) -> Update:
        self.given.append(state)
        self.gave.append(self.trainer.fit(state, batches, plan, on_step))
        return self.gave[-1]


def statistics(rounds: Rounds) -> dict[str, Watched]:
    """Put watches around the trainers of all edges, until the next plan."""
    found = {name: Watched(work.trainer) for name, work in rounds._backend._works.items()}
    rounds._backend._works.update({name: replace(work, trainer=found[name]) for name, work in rounds._backend._works.items()})  # type: ignore[misc]
    return found


def with_ranks(job: Job, ranks: dict[str, int]) -> Job:
    """The same job, its edges at these ranks."""
    from atoll.adapters.fresh import fresh_adapters

    plans = tuple(replace(edge, plan=replace(edge.plan, ranks=ranks)) for edge in job.edges)
    sizes = {module.name: (module.d_in, module.d_out) for module in job.shapes.modules}
    return replace(job, edges=plans, start=fresh_adapters("lora", sizes, ranks, job.config.adapter.alpha, 0))


def test_a_new_plan_resets_the_moments_of_changed_modules_and_keeps_the_others_bit_for_bit(place: Workplace) -> None:
    job = prepare(place.config(ALONE, {"run": {"rounds": 4}}))
    names = list(job.start.modules)
    log = EventLog(None)
    with Rounds(job, job.edges, "federated", log) as rounds:
        before = statistics(rounds)["north"]
        rounds.run(2)
        common = rounds.state
        ranks = dict.fromkeys(names, 4) | {names[0]: 2, names[1]: 8}
        del ranks[names[2]]
        later = with_ranks(job, ranks)
        rounds.replan(later, later.edges)
        assert rounds.num_done == 2
        after = statistics(rounds)["north"]
        rounds.run(2)
        end = rounds.state
    first, old = after.given[0], before.gave[-1].state.optimizer
    assert first.step == 4
    assert set(first.adapter.modules) == set(ranks)
    assert {name: one.rank for name, one in first.adapter.modules.items()} == ranks
    assert names[0] not in first.optimizer
    assert names[1] not in first.optimizer
    for name in names[2:]:
        assert torch.equal(first.optimizer[name].first, old[name].first)
        assert torch.equal(first.optimizer[name].second, old[name].second)
        assert first.optimizer[name].num_steps == old[name].num_steps == 4
    for name in names[3:]:
        assert torch.equal(first.adapter.modules[name].up_OR, common.modules[name].up_OR)
        assert torch.equal(first.adapter.modules[name].down_RI, common.modules[name].down_RI)
    torch.testing.assert_close(first.adapter.modules[names[1]].delta_OI(), common.modules[names[1]].delta_OI(), atol=1e-7, rtol=0)
    moments = after.gave[-1].state.optimizer
    assert [moments[name].num_steps for name in names[:4]] == [4, 4, 4, 8]
    assert torch.equal(end.modules[names[2]].up_OR, common.modules[names[2]].up_OR), "what nobody has any more stays"
    assert end.ranks == ranks | {names[2]: 4}
    job.close()


def test_a_plan_that_is_made_before_the_first_round_starts_as_it_says(place: Workplace) -> None:
    job = prepare(place.config(ALONE, {}))
    ranks = dict.fromkeys(list(job.start.modules)[:3], 6)
    later = with_ranks(job, ranks)
    with Rounds(job, job.edges, "federated", EventLog(None)) as rounds:
        rounds.replan(later, later.edges)
        assert rounds.state.digest() == later.start.digest()
    job.close()



def test_planning_the_same_again_changes_nothing_but_the_warm_ups(place: Workplace) -> None:
    once = place.train(ALONE, {"run": {"rounds": 3}, "plan": PLANNER}, "once")
    often = place.train(ALONE, {"run": {"rounds": 3}, "plan": {**PLANNER, "refresh": 1}}, "often")
    assert often.weights == once.weights
    assert (len(once.events("importance_found")), len(often.events("importance_found"))) == (1, 3)
    steps = [(event["phase"], event["round"]) for event in often.events("step_done")]
    assert steps == [(phase, at + number) for number in range(3) for phase, at in (("warm-up", 0), ("federated", 1)) for _ in range(2)]

    def federated(done: Done) -> list[tuple[object, ...]]:
        keys = ("step", "loss", "learning_rate", "grad_norm")
        return [tuple(event[key] for key in keys) for event in done.events("step_done") if event["phase"] == "federated"]

    assert federated(often) == federated(once)
    assert often.result.summary.edges[0].up_bytes > once.result.summary.edges[0].up_bytes


def too_slow_for_all(place: Workplace) -> tuple[dict[str, dict[str, object]], dict[str, object]]:
    """An edge that has time for a part of the weights only, and the [plan] that says so."""
    plan: dict[str, object] = {**PLANNER, "ranks": [2, 8]}
    probe = atoll.plan(place.config({"north": {"flops": "1 FLOP/s"}}, {"plan": plan}))
    assert probe.edges[0].predicted_seconds is not None
    speed = f"{probe.edges[0].predicted_seconds * 0.985:f} FLOP/s"
    return {"north": {"flops": speed}}, {**plan, "round_deadline": "1 s"}


def test_another_importance_in_the_middle_gives_other_ranks_and_goes_on_from_what_was_trained(place: Workplace) -> None:
    edges, plan = too_slow_for_all(place)
    edges = {name: {**edge, "mode": "local"} for name, edge in edges.items()}  # A host would do all of it in time.
    job = prepare(place.config(edges, {"run": {"rounds": 4}, "plan": plan}))
    pool = job.plan.pool
    first, second = (
        replanned(job, Importance("svd-sensitivity", {name: 1.0 + 50 * (name in liked) for name in pool}, {"north": 24}))
        for liked in (pool[:4], pool[4:])
    )
    before, after = first.plan.edges[0].ranks, second.plan.edges[0].ranks
    assert before != after
    with Rounds(job, job.edges, "federated", EventLog(None)) as rounds:
        rounds.replan(first, first.edges)
        assert rounds.state.ranks == before
        watched = statistics(rounds)["north"]
        rounds.run(2)
        common, moments = rounds.state, watched.gave[-1].state.optimizer
        rounds.replan(second, second.edges)
        watched = statistics(rounds)["north"]
        rounds.run(2)
        end = rounds.state
    (given, _) = watched.given
    assert given.adapter.ranks == after
    same = {name for name, rank in after.items() if before.get(name) == rank}
    changed = {name for name, rank in after.items() if name in before and name not in same}
    assert same | changed
    assert set(given.optimizer) & set(after) == same
    assert all(torch.equal(given.optimizer[name].second, moments[name].second) for name in same)
    for name in set(before) - set(after):
        assert torch.equal(end.modules[name].up_OR, common.modules[name].up_OR)
    for name in set(after) - set(before):
        assert not given.adapter.modules[name].up_OR.any()
    job.close()


def test_a_run_that_refreshes_keeps_the_last_importance_and_plan(place: Workplace) -> None:
    edges, plan = too_slow_for_all(place)
    done = place.train(edges, {"run": {"rounds": 5}, "plan": {**plan, "refresh": 2}})
    assert [event["round"] for event in done.events("round_finished")] == [1, 2, 3, 4, 5]
    assert len(done.events("importance_found")) == 3
    losses = [event["loss"] for event in done.events("step_done") if event["phase"] == "federated"]
    assert losses[-1] < losses[0]  # type: ignore[operator]
    saved = json.loads((done.result.run_dir / "importance.json").read_text())
    assert saved["scores"] == done.events("importance_found")[-1]["scores"]
    (edge,) = done.plan["edges"]  # type: ignore[misc]
    assert edge["ranks"] == dict(done.result.summary.edges[0].ranks)


def test_the_importance_of_one_run_plans_the_next(place: Workplace) -> None:
    first = place.train(ALONE, {"plan": PLANNER}, "first")
    file = str(first.result.run_dir / "importance.json")
    again = place.train(ALONE, {"plan": {**PLANNER, "importance_file": file}}, "again")
    assert again.events("importance_found") == []
    assert not [event for event in again.events("step_done") if event["phase"] == "warm-up"]
    assert again.plan["importance"] == first.plan["importance"] == "svd-sensitivity"
    assert [edge["ranks"] for edge in again.plan["edges"]] == [edge["ranks"] for edge in first.plan["edges"]]  # type: ignore[attr-defined]
    assert again.weights == first.weights


def test_an_importance_of_other_weights_is_refused(place: Workplace) -> None:
    file = place.folder / "importance.json"
    file.write_text(json.dumps(Importance("svd-sensitivity", {"elsewhere": 1.0}, {"north": 3}).to_json()))
    with pytest.raises(RunFolderError, match="importance of some modules is not known"):
        place.train(ALONE, {"plan": {**PLANNER, "importance_file": str(file)}})


@pytest.mark.parametrize("policy", ["as-written", "fedpipe"])
def test_an_edge_for_which_nothing_fits_is_refused_or_left_out(place: Workplace, policy: str) -> None:
    edges = {"north": {"memory": "8 GB"}, "tiny": {"memory": "1 MB"}}
    plan = {**PLANNER, "policy": policy}
    with pytest.raises(InfeasibleError) as caught:
        place.train(edges, {"plan": plan})
    assert "[[edge]] tiny" in caught.value.where
    assert not (place.folder / "run").exists()
    done = place.train(edges, {"plan": {**plan, "infeasible": "leave-out"}})
    assert [edge.name for edge in done.result.summary.edges] == ["north"]
    assert [one.name for one in done.result.summary.left_out] == ["tiny"]
    assert [event["edge"] for event in done.events("edge_left_out")] == ["tiny"]
    assert [event["edge"] for event in done.events("data_loaded") if event["role"] == "train"] == ["north"]


def test_all_edges_too_small_is_refused_even_where_they_may_be_left_out(place: Workplace) -> None:
    for policy in ("as-written", "fedpipe"):
        with pytest.raises(InfeasibleError):
            place.train({"tiny": {"memory": "1 MB"}}, {"plan": {**PLANNER, "policy": policy, "infeasible": "leave-out"}})


def test_an_edge_that_is_left_out_does_not_count_for_min_edges_only_if_enough_stay(place: Workplace) -> None:
    edges = {"north": {}, "south": {}, "tiny": {"memory": "1 MB"}}
    sections = {"plan": {"infeasible": "leave-out"}, "federated": {"min_edges": 2}}
    assert len(place.train(edges, sections).result.summary.edges) == 2


def test_every_some_rounds_the_held_out_rows_are_scored(place: Workplace) -> None:
    done = place.train(ALONE, {"run": {"rounds": 5}, "evaluate": {"every": 2}})
    rows = [event["row"] for event in done.events("evaluated")]
    assert rows == ["base", "round-2", "round-4", "federated"]
    plain = place.train(ALONE, {"run": {"rounds": 5}}, "plain")
    assert plain.weights == done.weights
    assert [event["row"] for event in plain.events("evaluated")] == ["base", "federated"]


def test_the_homogeneous_row_is_the_run_without_a_planner(place: Workplace) -> None:
    links = {"north": {"bandwidth": "8 Mbit/s"}, "south": {"bandwidth": "1 Mbit/s"}}
    compared = place.train(links, {"run": {"compare": ["homogeneous"]}, "plan": {**PLANNER, "ranks": [2, 8]}}, "compared")
    plain = place.train(links, {"model": {"quantize": 16}}, "plain")
    row = compared.result.summary.eval.homogeneous
    assert row is not None
    assert row.edges == ("north", "south")
    assert row.scores == plain.result.summary.eval.adapted
    assert row.simulated_seconds == plain.result.summary.seconds.simulated
    assert compared.result.summary.edges[0].steps == 4, "the comparison is no part of what the run costs"


def test_the_homogeneous_row_leaves_out_who_cannot_hold_it(place: Workplace) -> None:
    sections = {"run": {"compare": ["homogeneous"]}, "plan": {**PLANNER, "infeasible": "leave-out"}}
    done = place.train({"north": {}, "tiny": {"memory": "1 MB"}}, sections)
    assert done.result.summary.eval.homogeneous is not None
    assert done.result.summary.eval.homogeneous.edges == ("north",)


def test_where_a_frozen_delta_is_kept_the_planner_offers_no_host() -> None:
    """An edge that fits only in a host is planned so, but not by rules that a host cannot follow."""

    def planned(memory: int, aggregation: str) -> FleetPlan:
        config = RunConfig.model_validate({
            "plan": {**PLANNER, "ranks": (2,), "bits": (16,)}, "federated": {"aggregation": aggregation}, "data": {"max_length": 32},
            "edge": ({"name": "north", "memory": memory, "process_memory": 0},),
        })  # fmt: skip
        return plan_fleet(config, BASE, None)

    memory = 10**9
    while planned(memory, "exact-svd").edges[0].mode == "local":
        memory = memory * 9 // 10
    assert planned(memory, "exact-svd").edges[0].mode == planned(memory, "zero-pad").edges[0].mode == "split"
    for aggregation in ("stack", "residual"):
        assert planned(10**9, aggregation).edges[0].mode == "local"
        with pytest.raises(InfeasibleError) as caught:
            planned(memory, aggregation)
        assert "host" not in caught.value.expected


def test_edges_that_name_one_file_share_its_examples(place: Workplace) -> None:
    job = prepare(place.config({"a": {"data": "rows.csv"}, "b": {"data": "rows.csv"}, "c": {}}, {}))
    a, b, c = (edge.examples for edge in job.edges)
    assert a is b
    assert a is not c
    assert [len(examples) for examples in (a, b, c)] == [24, 24, 24]
    job.close()


def test_without_memory_for_a_warm_up_all_weights_count_alike(place: Workplace) -> None:
    job = prepare(place.config({"north": {}}, {"plan": PLANNER}))
    with_warm_up = job.plan.edge("north").predicted_peak_bytes
    done = place.train({"north": {"memory": with_warm_up - 1}}, {"plan": {**PLANNER, "warmup_rank": 64}})
    assert not done.events("importance_found")
    assert any("all weights count alike" in str(event["advice"]) for event in done.events("advised"))
    assert done.plan["importance"] == "none"


def test_more_edges_asked_for_than_can_take_part_is_infeasible(place: Workplace) -> None:
    edges: dict[str, dict[str, object]] = {"north": {}, "south": {"memory": 10**6}}
    with pytest.raises(InfeasibleError) as caught:
        prepare(place.config(edges, {"plan": {"infeasible": "leave-out"}, "federated": {"min_edges": 2}}))
    assert "2, and 1 that can; left out: south" in caught.value.page()


def test_a_planner_offers_no_host_to_a_classifier() -> None:
    config = RunConfig.model_validate({"plan": {"policy": "fedpipe"}, "model": {"task": "classify"}, "data": {"text": "{a}", "label": "b"}})
    planner = EdgeSearch(config, BASE, [module.name for module in BASE.modules], {module.name: 1.0 for module in BASE.modules})
    assert not any(place.split for place in planner.places(Edge(name="north")))


def test_an_update_that_is_clipped_is_told(place: Workplace) -> None:
    done = place.train({"north": {}, "south": {}}, {"federated": {"clip_update": 1e-3}})
    told = done.events("update_clipped")
    assert [(event["round"], event["edge"]) for event in told] == [(1, "north"), (1, "south"), (2, "north"), (2, "south")]
    assert all(event["limit"] == 1e-3 < event["norm"] for event in told)  # type: ignore[operator]
    assert place.train({"north": {}, "south": {}}, {}, "free").events("update_clipped") == []
