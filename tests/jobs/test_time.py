"""Simulated time: seconds by hand, and what becomes of edges that are late by them."""

from __future__ import annotations

from math import fsum

import pytest

import atoll
from atoll.config.schema import Edge, RunConfig
from atoll.cost.formulas import Flops
from atoll.cost.work import Work
from atoll.errors import EdgesLostError, InfeasibleError
from atoll.jobs.clock import Clock, clock_of

from tests.jobs.conftest import Done, Workplace

FAST = {"bandwidth": "8 Mbit/s", "latency": "10 ms"}
SLOW = {"bandwidth": "80 kbit/s", "latency": "10 ms"}


def clock(deadline: float | None = None, *, drops: bool = False) -> Clock:
    edges = (Edge(name="both", flops=2e9, bandwidth=8e6, latency=0.01), Edge(name="link", bandwidth=8e3), Edge(name="none"))
    return Clock({edge.name: edge for edge in edges}, deadline, drops)


def test_an_edges_seconds_are_work_and_bytes_and_latencies_by_what_it_declares() -> None:
    work = Work(Flops(10**9, 6 * 10**9, 3 * 10**9), num_round_trips=4)
    # 10 GFLOP at 2 GFLOP/s; 10 MB at 1 MB/s; the adapter's way and four exchanges, 10 ms each way.
    assert clock().edge_seconds("both", work, 10**7) == pytest.approx(5 + 10 + 5 * 0.02)
    assert clock().edge_seconds("link", work, 500) == pytest.approx(0.5)
    assert clock().edge_seconds("none", work, 500) is None
    assert clock().edge_seconds("central", work, 500) is None


@pytest.mark.parametrize(
    ("seconds", "num_late", "expected"),
    [([1.0, 3.0, 2.0], 0, 3.0), ([1.0, None], 0, None), ([], 0, None), ([1.0], 1, 7.0), ([], 2, 7.0), ([None], 1, None)],
)
def test_a_round_lasts_as_long_as_its_slowest_edge_or_to_the_deadline(
    seconds: list[float | None], num_late: int, expected: float | None
) -> None:
    assert clock(7.0, drops=True).round_seconds(seconds, num_late) == expected


@pytest.mark.parametrize(("late", "counts"), [("wait", True), ("cut", True), ("drop", False)])
def test_only_a_clock_that_drops_calls_edges_late(late: str, counts: bool) -> None:
    config = RunConfig.model_validate({"plan": {"round_deadline": 2.0}, "federated": {"late": late}})
    assert clock_of(config).lateness(2.0) is None
    assert clock_of(config).lateness(None) is None
    assert (clock_of(config).lateness(2.01) is None) == counts


def seconds_of(done: Done, declared: dict[str, float]) -> list[float]:
    """Every round's seconds, from the bytes that the events name and the rates of `declared`; latency 10 ms."""
    rounds: dict[object, list[float]] = {}
    for event in done.events("edge_finished"):
        moved = event["up_bytes"] + event["down_bytes"]  # type: ignore[operator]
        rounds.setdefault(event["round"], []).append(8 * moved / declared[str(event["edge"])] + 2 * 0.01)
    return [max(edges) for _, edges in sorted(rounds.items())]  # type: ignore[type-var]


def test_the_events_and_the_summary_tell_the_seconds_of_the_slowest_link(place: Workplace) -> None:
    done = place.train({"fast": FAST, "slow": SLOW}, {})
    by_hand = seconds_of(done, {"fast": 8e6, "slow": 8e4})
    assert [event["simulated_seconds"] for event in done.events("round_finished")] == pytest.approx(by_hand)
    assert done.result.summary.seconds.simulated == pytest.approx(fsum(by_hand))


def test_speed_counts_the_floating_point_operations_of_the_summary(place: Workplace) -> None:
    done = place.train({"only": {"flops": "1 MFLOP/s"}}, {})
    assert done.result.summary.seconds.simulated == pytest.approx(done.result.summary.edge_compute.flops / 1e6)


def test_a_warm_up_takes_simulated_time_too(place: Workplace) -> None:
    done = place.train({"fast": FAST, "slow": SLOW}, {"plan": {"policy": "fedpipe", "warmup_steps": 2}})
    rates = {"fast": 8e6, "slow": 8e4}
    in_rounds = dict.fromkeys(rates, 0)
    for event in done.events("edge_finished"):
        in_rounds[str(event["edge"])] += event["up_bytes"] + event["down_bytes"]  # type: ignore[operator]
    warm_up = max(
        8 * (edge.up_bytes + edge.down_bytes - in_rounds[edge.name]) / rates[edge.name] + 2 * 0.01 for edge in done.result.summary.edges
    )
    assert warm_up > 0.02
    assert done.result.summary.seconds.simulated == pytest.approx(warm_up + fsum(seconds_of(done, rates)))


def test_updates_weigh_by_planned_steps_where_that_is_asked_for(place: Workplace) -> None:
    planned = {"policy": "fedpipe", "importance": "none", "bits": [16]}
    edges = {"fast": {"flops": "3 MFLOP/s"}, "slow": {"flops": "1 MFLOP/s"}}
    weights = {
        (steps, weigh): place.train(
            edges, {"plan": planned | {"steps": steps}, "federated": {"weigh": weigh}}, f"{steps}-{weigh}"
        ).weights
        for steps in ("asked", "fill") for weigh in ("rows", "steps")
    }  # fmt: skip
    assert weights["asked", "rows"] == weights["asked", "steps"]
    assert weights["fill", "rows"] != weights["fill", "steps"]


def test_where_one_edge_declares_nothing_no_time_is_told(place: Workplace) -> None:
    done = place.train({"fast": FAST, "other": {}}, {})
    assert done.result.summary.seconds.simulated is None
    assert [event["simulated_seconds"] for event in done.events("round_finished")] == [None, None]


def test_waiting_for_a_late_edge_changes_nothing_but_what_is_recorded(place: Workplace) -> None:
    edges = {"fast": FAST, "slow": SLOW}
    plain = place.train(edges, {}, "plain")
    waited = place.train(edges, {"plan": {"round_deadline": "1 s"}, "federated": {"late": "wait"}}, "waited")
    assert waited.weights == plain.weights
    assert waited.events("edge_dropped") == []
    assert [edge.under_training for edge in waited.result.summary.edges] == [0.0, 1.0]
    assert [edge.under_training for edge in plain.result.summary.edges] == [0.0, 0.0]


def test_an_edge_that_is_dropped_is_named_and_the_round_ends_at_the_deadline(place: Workplace) -> None:
    done = place.train({"fast": FAST, "slow": SLOW}, {"plan": {"round_deadline": "1 s"}, "federated": {"late": "drop"}})
    dropped = done.events("edge_dropped")
    assert [(event["round"], event["edge"]) for event in dropped] == [(1, "slow"), (2, "slow")]
    assert all("late" in str(event["reason"]) and "1.0 s" in str(event["reason"]) for event in dropped)
    assert [event["simulated_seconds"] for event in done.events("round_finished")] == [1.0, 1.0]
    assert [event["edges"] for event in done.events("round_finished")] == [["fast"], ["fast"]]
    assert [edge.dropped_rounds for edge in done.result.summary.edges] == [0, 2]
    alone = place.train({"fast": FAST}, {"data": {"partition": "iid", "train_rows": 12}}, "alone")
    assert [event["simulated_seconds"] for event in alone.events("round_finished")] != [1.0, 1.0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_edge_is_not_dropped_for_the_names_in_its_messages(place: Workplace, precision: str) -> None:
    """What a plan fills to its deadline is smaller than the messages that carry it."""
    thin, free = {"bandwidth": "0.1 Mbit/s"}, {"policy": "fedpipe", "importance": "none"}
    travel = {"precision": precision}
    largest = atoll.plan(place.config({"thin": thin}, {"plan": free, "federated": travel})).edges[0].predicted_seconds
    assert largest is not None
    for share in (0.3, 0.5, 0.7):
        plan = {**free, "round_deadline": f"{share * largest} s"}
        done = place.train({"thin": thin}, {"plan": plan, "federated": {**travel, "late": "drop"}}, f"run-{share}")
        assert done.events("edge_dropped") == []
        assert all(event["simulated_seconds"] <= share * largest for event in done.events("round_finished"))  # type: ignore[operator]


def test_a_round_with_too_few_edges_in_time_ends_the_run(place: Workplace) -> None:
    sections = {"plan": {"round_deadline": "1 s"}, "federated": {"late": "drop", "min_edges": 2}}
    with pytest.raises(EdgesLostError, match="round 1 got too few updates") as caught:
        place.train({"fast": FAST, "slow": SLOW}, sections)
    assert "1 of 2 edges" in caught.value.got
    assert "slow: late" in caught.value.got


CUT = {"plan": {"round_deadline": "1 s"}, "federated": {"late": "cut"}, "train": {"local_steps": 6}}


def speed_for(place: Workplace, steps: float) -> str:
    """A speed at which an edge does so many steps in a second, by formula."""
    plan = atoll.plan(place.config({"one": {"flops": "1 FLOP/s"}}, {"train": {"local_steps": 1}}))
    assert plan.edges[0].predicted_seconds is not None
    return f"{plan.edges[0].predicted_seconds * steps:f} FLOP/s"


def test_an_edge_that_is_cut_off_does_the_steps_that_fit(place: Workplace) -> None:
    edges = {"fast": {"flops": "1 TFLOP/s"}, "slow": {"flops": speed_for(place, 2.5)}}
    done = place.train(edges, CUT)
    assert [(event["edge"], event["num_steps"]) for event in done.events("edge_finished")] == [("fast", 6), ("slow", 2)] * 2
    assert done.events("edge_dropped") == []
    fast, slow = done.result.summary.edges
    assert (fast.steps, slow.steps) == (12, 4)
    assert (fast.under_training, slow.under_training) == (0.0, pytest.approx(4 / 6))
    planned = {edge["name"]: edge for edge in done.plan["edges"]}  # type: ignore[attr-defined, index, union-attr]
    assert (planned["fast"]["binding"], planned["slow"]["binding"]) == ("none", "deadline")
    assert planned["slow"]["why"].startswith("2 of 6 steps, as many as it can do in 1.0 s; ")
    assert planned["slow"]["predicted_seconds"] <= 1.0
    assert all(0 < event["simulated_seconds"] <= 1.0 for event in done.events("round_finished"))  # type: ignore[operator]


def test_the_learning_rate_of_an_edge_that_is_cut_off_ends_with_its_own_steps(place: Workplace) -> None:
    done = place.train({"slow": {"flops": speed_for(place, 2.5)}}, CUT)
    rates = [event["learning_rate"] for event in done.events("step_done")]
    assert len(rates) == 4
    assert rates[-1] < 0.2 * rates[0]  # type: ignore[operator]


def test_an_edge_that_cannot_do_one_step_is_refused_or_left_out(place: Workplace) -> None:
    edges = {"fast": {"flops": "1 TFLOP/s"}, "slow": {"flops": speed_for(place, 0.9)}}
    with pytest.raises(InfeasibleError, match="1 of 2 edges cannot do one step by the deadline") as caught:
        place.train(edges, CUT)
    assert caught.value.where == "[[edge]] slow"
    plan = {**CUT["plan"], "infeasible": "leave-out"}  # type: ignore[dict-item]
    done = place.train(edges, {**CUT, "plan": plan})
    assert [edge.name for edge in done.result.summary.edges] == ["fast"]
    assert [(one.name, one.why) for one in done.result.summary.left_out] == [
        ("slow", "slow cannot do one step in 1.0 s by its declared speed and link")
    ]
    with pytest.raises(InfeasibleError):
        place.train({"slow": edges["slow"]}, {**CUT, "plan": plan}, "nobody")


def test_comparison_rows_wait_for_an_edge_that_the_federation_drops(place: Workplace) -> None:
    edges: dict[str, dict[str, object]] = {"fast": FAST, "slow": SLOW}
    sections = {"run": {"compare": ["local-only"]}, "plan": {"round_deadline": "1 s"}, "federated": {"late": "drop"}}
    done = place.train(edges, sections)
    assert done.result.summary.status == "complete"
    assert done.result.summary.eval.local_only is not None
    assert set(done.result.summary.eval.local_only.edges) == {"fast", "slow"}
    assert {event["edge"] for event in done.events("edge_dropped")} == {"slow"}
