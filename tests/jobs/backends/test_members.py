"""Edges that come and go while a run goes on: what they train, and who is told to wait for the next run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

import atoll
from atoll.commands.train import train_job
from atoll.jobs.backends.members import with_newcomer, without
from atoll.jobs.job import Job, prepare
from atoll.jobs.resume_state import _plan_hash
from atoll.runs.summary import read_summary

from tests.fleet.test_joining import Simulated, simulated
from tests.jobs.conftest import Workplace

THREE: dict[str, dict[str, object]] = {"north": {}, "south": {}, "west": {}}
ORDER = list(THREE)


@pytest.fixture
def whole(place: Workplace) -> Iterator[Job]:
    found = prepare(place.config(THREE, {"run": {"rounds": 5}}))
    yield found
    found.close()


def edge_of(job: Job, name: str) -> tuple[object, object]:
    return next(one for one in job.config.edge if one.name == name), next(one for one in job.edges if one.name == name)


def test_who_comes_later_trains_the_rounds_that_are_left(place: Workplace) -> None:
    config = place.config(THREE, {"run": {"rounds": 5}})
    run = simulated(config, place.folder / "run", {"west": 3}, {"south": 5})
    summary = read_summary(run / "summary.json")
    assert {edge.name: edge.steps for edge in summary.edges} == {"north": 10, "west": 6}
    assert [one.name for one in summary.left_out if "left for good" in one.why] == ["south"]
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["event"] == "step_done" and line["edge"] == "west"]
    whole_run = atoll.train(config, out=place.folder / "whole")
    lines = [json.loads(line) for line in (whole_run.run_dir / "events.jsonl").read_text().splitlines()]
    first = next(line["learning_rate"] for line in lines if line["event"] == "step_done" and line["edge"] == "west")
    assert rates[0] == first, "its schedule begins with it"
    assert rates[-1] < rates[0]


def test_with_and_without_come_to_the_plan_of_who_is_there(whole: Job) -> None:
    two = without(whole, "west", 1)
    again = with_newcomer(two, *edge_of(whole, "west"), ORDER)  # type: ignore[arg-type]
    assert isinstance(again, Job)
    assert [edge.name for edge in again.edges] == ORDER
    assert _plan_hash(again) == _plan_hash(whole)
    assert again.plan.left_out == whole.plan.left_out
    assert with_newcomer(whole, *edge_of(whole, "west"), ORDER) == "an edge of this name takes part"  # type: ignore[arg-type]


def test_who_would_change_the_others_waits(whole: Job) -> None:
    two = without(whole, "west", 1)
    plan = two.config.plan.model_copy(update={"policy": "fedpipe"})
    planned = replace(two, loaded=replace(two.loaded, config=two.config.model_copy(update={"plan": plan})))
    said = with_newcomer(planned, *edge_of(whole, "west"), ORDER)  # type: ignore[arg-type]
    assert isinstance(said, str)
    assert "would plan all edges anew" in said


def test_a_run_that_somebody_joined_goes_on_after_a_stop(place: Workplace) -> None:
    from atoll.commands.resume import resume_by
    from atoll.runs.events import CheckpointWritten, Event

    config = place.config(THREE, {"run": {"rounds": 5}})
    run = simulated(config, place.folder / "run", {"west": 2}, {})

    def stop(event: Event) -> None:
        if isinstance(event, CheckpointWritten) and event.round == 3:
            raise KeyboardInterrupt

    whole = prepare(config)
    job = replace(without(whole, "west", 1), start=whole.start)
    with pytest.raises(KeyboardInterrupt):
        train_job(job, place.folder / "stopped", (stop,), partial(Simulated, whole, {"west": 2}, {}))
    again = resume_by(place.folder / "stopped", lambda loaded, _: (prepare(config), None), ())
    weights = "adapter_model.safetensors"
    assert (again.adapter / weights).read_bytes() == (run / "adapter" / weights).read_bytes()


def test_who_left_is_told_after_a_stop_and_the_run_is_repeated_with_all(place: Workplace) -> None:
    from atoll.commands.resume import resume_by
    from atoll.runs.events import CheckpointWritten, Event

    config = place.config(THREE, {"run": {"rounds": 4}})

    def stop(event: Event) -> None:
        if isinstance(event, CheckpointWritten) and event.round == 2:
            raise KeyboardInterrupt

    whole = prepare(config)
    with pytest.raises(KeyboardInterrupt):
        train_job(whole, place.folder / "stopped", (stop,), partial(Simulated, whole, {}, {"west": 2}))
    two = without(prepare(config), "west", 2)
    two = replace(two, plan=replace(two.plan, left_out=()))  # As on a fleet, whose rows are not dealt anew.
    run = resume_by(place.folder / "stopped", lambda loaded, _: (two, None), ()).run_dir
    assert [one.name for one in read_summary(run / "summary.json").left_out] == ["west"]
    assert "3 owners" in (run / "adapter" / "README.md").read_text()
    assert [one["name"] for one in json.loads((run / "config.json").read_text())["config"]["edge"]] == ["north", "south"]
    again = atoll.train(run, out=place.folder / "again")
    assert [edge.name for edge in again.summary.edges] == ORDER
    assert again.adapter.joinpath("adapter_model.safetensors").read_bytes() == (
        atoll.train(config, out=place.folder / "whole").adapter / "adapter_model.safetensors"
    ).read_bytes()  # fmt: skip
