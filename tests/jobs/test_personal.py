"""[federated] personal_steps: each edge's own copy after the last round, on its own held-out rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import atoll
from atoll.adapters.peft_files import load_adapter
from atoll.adapters.state import AdapterState
from atoll.errors import AtollError, ConflictError
from atoll.federated.aggregation.aggregate import Common, joined
from atoll.jobs.job import prepare
from atoll.runs.summary import read_summary
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState

from tests.jobs.conftest import Workplace

TWO: dict[str, dict[str, object]] = {"north": {}, "south": {}}
PERSONAL: dict[str, dict[str, object]] = {"run": {"compare": ["local-only", "central"]}, "federated": {"personal_steps": 3}}


def same(one: AdapterState, other: AdapterState) -> None:
    assert one.parts.keys() == other.parts.keys()
    for name in one.parts:
        for a, b in zip(one.parts[name].tensors, other.parts[name].tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # A file has them in another order, in which gradients are summed.


def test_a_copy_is_what_the_edge_alone_makes_of_the_common_adapter(place: Workplace) -> None:
    done = place.train(TWO, PERSONAL)
    run = done.result.run_dir
    common, job = load_adapter(done.result.adapter), prepare(place.folder / "run.toml")
    for edge in job.edges:
        trainer = LocalTrainer(job.base, job.config.train, total_steps=3, dropout=0.0, seed=job.config.run.seed, edge=edge.name)
        assert edge.batches is not None
        update = trainer.fit(TrainState(common, {}, 0), edge.batches, FitPlan(3, 1, False, None), lambda report: None)
        same(load_adapter(run / "edges" / edge.name / "personal"), update.state.adapter)
    personal = done.result.summary.eval.personal
    assert personal is not None
    assert {edge: set(rows) for edge, rows in personal.items()} == {
        edge: {"base", "local_only", "federated", "personal", "central"} for edge in TWO
    }  # fmt: skip
    assert read_summary(run / "summary.json") == done.result.summary
    assert [line["row"] for line in done.events("evaluated") if str(line["row"]).endswith(":north")] == [
        "local-only:north", "base:north", "local-only:north", "central:north", "federated:north", "personal:north",
    ]  # fmt: skip


def test_it_changes_nothing_of_the_run(place: Workplace) -> None:
    without, with_copies = place.train(TWO, {}, "without"), place.train(TWO, {"federated": {"personal_steps": 3}}, "with")
    assert without.weights == with_copies.weights
    one, other = without.result.summary, with_copies.result.summary
    assert (one.eval, one.traffic) == (replace(other.eval, personal=None), other.traffic)
    assert other.edge_compute.flops > one.edge_compute.flops, "what it costs is counted"
    assert "personal" not in json.loads((without.result.run_dir / "summary.json").read_text())["eval"]


def test_own_rows_are_the_file_of_an_edge_or_those_of_its_values(place: Workplace) -> None:
    data = {"eval": "held.csv", "partition": "by:owner", "eval_rows": None}
    config = place.config(TWO, {"federated": {"personal_steps": 1}, "data": data})
    rows = [f"w{n} w{n + 1},w{n + 2},{('north', 'south')[n % 2]}" for n in range(20)]
    (place.folder / "rows.csv").write_text("\n".join(["a,b,owner", *rows]) + "\n")
    (place.folder / "held.csv").write_text("\n".join(["a,b,owner", *rows[:3]]) + "\n")
    (place.folder / "own.csv").write_text("\n".join(["a,b", "w1 w2,w3"]) + "\n")

    def counts(overrides: list[str], out: str) -> dict[str, object]:
        personal = atoll.train(config, out=place.folder / out, overrides=overrides).summary.eval.personal
        return {edge: rows["personal"]["num_rows"] for edge, rows in (personal or {}).items() if rows}

    assert counts([], "by") == {"north": 2.0, "south": 1.0}
    assert counts(["edge.north.eval=own.csv"], "own") == {"north": 1.0, "south": 1.0}
    (place.folder / "held.csv").write_text("\n".join(["a,b,owner", rows[0]]) + "\n")
    assert counts([], "one") == {"north": 1.0}
    assert "is not scored" in (place.folder / "one" / "events.jsonl").read_text()
    assert counts(["data.partition=iid"], "all") == {"north": 1.0, "south": 1.0}
    assert "held-out rows of all edges" in (place.folder / "all" / "events.jsonl").read_text()


def test_without_held_out_rows_copies_are_made_and_nothing_is_scored(place: Workplace) -> None:
    config = place.config(TWO, {"federated": {"personal_steps": 1}})
    config.write_text("".join(line for line in config.read_text().splitlines(keepends=True) if not line.startswith("eval")))
    run = atoll.train(config, out=place.folder / "run")
    assert run.summary.eval.personal == {"north": {}, "south": {}}
    assert (run.run_dir / "edges" / "south" / "personal" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("sections", [
    {"federated": {"aggregation": "stack"}}, {"federated": {"aggregation": "residual"}}, {"adapter": {"kind": "bottleneck"}},
    {"adapter": {"kind": "full"}}, {"select": {"policy": "kill-and-revive", "every": 4, "observe_steps": 1}},
], ids=["stack", "residual", "bottleneck", "full", "kill-and-revive"])  # fmt: skip
def test_of_every_kind(sections: dict[str, dict[str, object]], place: Workplace) -> None:
    sections = {**sections, "federated": {**sections.get("federated", {}), "personal_steps": 6}}
    run = place.train(TWO, {**sections, "train": {"learning_rate": 0.05}}).result
    for edge, rows in (run.summary.eval.personal or {}).items():
        assert rows["personal"] != rows["federated"], edge


def test_an_edge_of_another_rank_trains_its_own_part(place: Workplace) -> None:
    run = place.train({"north": {"rank": 2}, "south": {"rank": 4}}, {"federated": {"personal_steps": 2}}).result
    ranks = {edge: set(load_adapter(run.run_dir / "edges" / edge / "personal").ranks.values()) for edge in ("north", "south")}
    assert ranks == {"north": {2}, "south": {4}}


def test_a_run_that_is_stopped_at_its_copies_comes_to_the_same(place: Workplace) -> None:
    from atoll.runs.events import Event, StepDone

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and (event.phase, event.edge, event.step) == ("personal", "south", 1):
            raise KeyboardInterrupt

    config, whole = place.config(TWO, PERSONAL), place.train(TWO, PERSONAL, "whole").result
    with pytest.raises(KeyboardInterrupt):
        atoll.train(config, out=place.folder / "stopped", observers=[stop])
    again = atoll.resume(place.folder / "stopped")
    assert again.summary.eval == whole.summary.eval
    assert again.summary.edge_compute == whole.summary.edge_compute
    for edge in TWO:
        file = Path("edges") / edge / "personal" / "adapter_model.safetensors"
        assert (again.run_dir / file).read_bytes() == (whole.run_dir / file).read_bytes()


def test_split_edges_have_copies_too(place: Workplace) -> None:
    local = place.train(TWO, {"federated": {"personal_steps": 2}}, "local").result
    split = place.train({"north": {"mode": "split"}, "south": {}}, {"federated": {"personal_steps": 2}}, "split").result
    for edge in TWO:
        states = [load_adapter(run.run_dir / "edges" / edge / "personal") for run in (local, split)]
        for name, part in states[0].modules.items():
            torch.testing.assert_close(part.delta_OI(), states[1].modules[name].delta_OI(), rtol=1e-3, atol=1e-5)


def test_it_is_in_the_plan(place: Workplace) -> None:
    speed = {"flops": "1 GFLOP/s", "bandwidth": "10 Mbit/s"}
    config = place.config({"north": speed, "south": speed}, {})
    without, planned = atoll.plan(config), atoll.plan(config, overrides=["federated.personal_steps=4"])
    assert planned.personal_steps == 4
    assert planned.personal_seconds is not None
    assert planned.personal_seconds == 2 * max(edge.predicted_seconds or 0 for edge in planned.edges), "rounds are of two steps"
    assert planned.predicted_seconds == (without.predicted_seconds or 0) + planned.personal_seconds
    assert (planned.up_bytes, planned.down_bytes) == (without.up_bytes, without.down_bytes)


def test_what_is_wrong_is_said_before_anything_is_written(place: Workplace) -> None:
    config = place.config({"north": {"eval": "own.csv"}, "south": {}}, {})
    with pytest.raises(ConflictError, match="personal copy"):
        atoll.plan(config)
    for content in (None, "x,y\n1,2\n"):
        if content is not None:
            (place.folder / "own.csv").write_text(content)
        with pytest.raises(AtollError):
            atoll.train(config, out=place.folder / "run", overrides=["federated.personal_steps=2"])
        assert not (place.folder / "run").exists()


def test_joined_gives_back_what_is_alone() -> None:
    state = AdapterState("lora", {})
    assert joined(Common(state, None)) is state
