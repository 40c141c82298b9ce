"""atoll edge: one of the edges of a run.toml, against a host."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftModel

from atoll.base.load import load_base
from atoll.commands.edge import edge
from atoll.commands.evaluate import evaluate
from atoll.commands.generate import generate
from atoll.commands.train import train
from atoll.errors import ConflictError, HostLostError, HostRefusedError, OutputError
from atoll.jobs.split import HostAccess, serve, start_host
from atoll.split.host.tenants import HostLimits

from tests.conftest import save_model_folder, write_job
from tests.run_files import Sections, write_run

SECTIONS: Sections = {"data": {"partition": "by:owner"}, "wire": {"mode": "factored"}}
EDGES: Sections = {"north": {}, "south": {}, "west": {"data": "not-on-this-machine.jsonl"}}
MIXED: Sections = {"north": {"mode": "split"}, "south": {}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run.toml with three edges, a base and data."""
    write_job(tmp_path, SECTIONS, EDGES, owners=("north", "south"), count=20)
    return tmp_path


@pytest.fixture
def access(folder: Path) -> Iterator[HostAccess]:
    """A host of this base."""
    limits, source = HostLimits(max_tokens=4096), str(folder / "base")
    host = start_host(serve(load_base(source), source, "fp32", 32, limits), limits, "127.0.0.1:0", None)
    yield HostAccess(f"127.0.0.1:{host.port}")
    host.stop()


def test_one_edge_trains_on_its_own_share(folder: Path, access: HostAccess) -> None:
    result = edge(folder / "run.toml", access, name="north", out=folder / "out")
    (only,) = result.summary.edges
    assert (only.name, only.mode, only.steps) == ("north", "split", 6)
    events = [json.loads(line) for line in (folder / "out" / "events.jsonl").read_text().splitlines()]
    assert [event["num_rows"] for event in events if event["event"] == "data_loaded" and event["role"] == "train"] == [10]
    traffic = result.summary.traffic
    assert traffic.formula_shared_bytes is not None
    assert traffic.formula_unshared_bytes is not None
    assert traffic.formula_shared_bytes < traffic.formula_unshared_bytes
    assert sum((traffic.up_bytes_by_kind or {}).values()) < traffic.up_bytes


def test_a_planner_leaves_the_blocks_of_one_edge_in_its_host(folder: Path, access: HostAccess) -> None:
    settings = ("plan.policy=fedpipe", "plan.warmup_steps=2", "plan.ranks=[2,4]")
    result = edge(folder / "run.toml", access, name="north", out=folder / "out", overrides=settings)
    (only,) = result.summary.edges
    assert (only.name, only.mode, only.steps) == ("north", "split", 6)
    assert set(only.ranks.values()) == {4}


def test_the_adapter_is_that_of_local_training_and_loads_in_peft(folder: Path, access: HostAccess) -> None:
    """Two ways to the same: this edge against a host, and alone with the whole base."""
    split = edge(folder / "run.toml", access, name="south", out=folder / "split")
    rows = [line for line in (folder / "rows.jsonl").read_text().splitlines() if "south" in line]
    (folder / "south.jsonl").write_text("\n".join(rows) + "\n")
    local = train(write_run(folder, SECTIONS, {"south": {"data": "south.jsonl"}}), out=folder / "local")
    base = load_base(str(folder / "base"))
    one, other = (PeftModel.from_pretrained(load_base(str(folder / "base")).model, result.adapter) for result in (split, local))
    ids = base.tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    assert (one(input_ids=ids).logits - other(input_ids=ids).logits).abs().max() < 1e-4
    assert (one(input_ids=ids).logits - base.model(input_ids=ids).logits).abs().max() > 1e-3


def test_what_was_trained_is_scored_and_talks_through_the_host(folder: Path, access: HostAccess) -> None:
    result = edge(folder / "run.toml", access, name="north", out=folder / "out")
    here, there = evaluate(run_dir=result.run_dir), evaluate(run_dir=result.run_dir, host=access)
    assert there["adapted"]["loss"] == pytest.approx(here["adapted"]["loss"], rel=1e-5)
    assert there["base"]["loss"] == pytest.approx(here["base"]["loss"], rel=1e-5)
    for prompt in ("w1 w2", "w5", ""):
        assert generate(result.run_dir, prompt, max_new_tokens=6, host=access) == generate(result.run_dir, prompt, max_new_tokens=6)


def test_a_part_comes_from_the_host(folder: Path, access: HostAccess) -> None:
    wanted = edge(folder / "run.toml", access, name="north", out=folder / "a")
    without = write_run(folder, {**SECTIONS, "model": {"base": "nowhere"}}, EDGES)
    got = edge(without, access, name="north", fetch_base=folder / "part", out=folder / "b")
    again = edge(without, access, name="north", fetch_base=folder / "part", out=folder / "c")
    files = [(result.adapter / "adapter_model.safetensors").read_bytes() for result in (wanted, got, again)]
    assert files[0] == files[1] == files[2]
    held = (folder / "part" / "model.safetensors").stat().st_size
    assert held < (folder / "base" / "model.safetensors").stat().st_size


def test_refusals_leave_nothing(folder: Path, access: HostAccess) -> None:
    with pytest.raises(ConflictError, match="which edge"):
        edge(folder / "run.toml", access, out=folder / "out")
    with pytest.raises(ConflictError, match="which edge"):
        edge(folder / "run.toml", access, name="east", out=folder / "out")
    save_model_folder(folder / "base2", "qwen3")
    with pytest.raises(HostRefusedError) as caught:
        edge(folder / "run.toml", access, name="north", out=folder / "out", overrides=["model.base=base2"])
    assert "base_digest" in caught.value.what
    with pytest.raises(HostLostError):
        edge(folder / "run.toml", HostAccess("127.0.0.1:1"), name="north", out=folder / "out")
    assert not (folder / "out").exists()


def test_split_and_local_edges_share_rounds(folder: Path) -> None:
    """mode = "split" in `atoll train` starts a host on loopback; the result is that of local edges."""
    mixed = train(write_run(folder, SECTIONS, MIXED), out=folder / "mixed")
    plain = train(write_run(folder, SECTIONS), out=folder / "plain")
    assert [one.mode for one in mixed.summary.edges] == ["split", "local"]
    assert mixed.summary.eval.adapted is not None
    assert plain.summary.eval.adapted is not None
    assert mixed.summary.eval.adapted["loss"] == pytest.approx(plain.summary.eval.adapted["loss"], rel=1e-4)
    assert mixed.summary.edge_compute.block_flops < plain.summary.edge_compute.block_flops
    assert mixed.summary.edge_compute.adapter_flops < plain.summary.edge_compute.adapter_flops, "the wire is factored: the host has B"


def test_a_refused_output_folder_leaves_no_host_behind(folder: Path) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError):
        train(write_run(folder, SECTIONS, MIXED), out=folder / "full")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("atoll-session")]
