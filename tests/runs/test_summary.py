"""summary.json, as programs rely on it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from atoll.errors import RunFolderError
from atoll.runs.summary import (
    Durations,
    EdgeCompute,
    EdgeSummary,
    Evaluation,
    FirstStepFlops,
    Homogeneous,
    LocalOnly,
    PrivacySpent,
    Summary,
    Traffic,
    read_summary,
    versions,
    write_summary,
)

RANKS, FIRST = {"model.layers.0.self_attn.q_proj": 8}, FirstStepFlops(110, 100, 30, 30)
EDGE = EdgeSummary("north", "local", 32, 8, RANKS, 150, 10**9, None, 1.0, 100, 200, 0, FIRST)
CLOUDS = EdgeSummary("south", "cloud", 32, 8, {}, 150, None, None, 1.0, 9, 0, 0)
SUMMARY = Summary(
    status="complete",
    eval=Evaluation({"loss": 4.3, "perplexity": 73.7}, {"loss": 1.1}, LocalOnly({"loss": 1.5}, {"north": {"loss": 1.5}}), {"loss": 1.0}),
    traffic=Traffic(100, 200),
    edge_compute=EdgeCompute(4e9, 1e9, 1e9, 2e9, 1e9),
    seconds=Durations(12.5, None),
    edges=(EDGE, CLOUDS),
    versions=versions(),
)  # fmt: skip


def test_the_fields_of_the_contract_are_there(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, SUMMARY)
    value = json.loads(path.read_text())
    assert set(value) == {"status", "eval", "traffic", "edge_compute", "seconds", "edges", "left_out", "privacy", "versions", "wire"}
    assert value["eval"]["local_only"] == {"loss": 1.5, "edges": {"north": {"loss": 1.5}}}
    assert set(value["traffic"]) == {"up_bytes", "down_bytes"}
    parts = {"flops", "adapter_flops", "head_flops", "block_flops"}
    assert set(value["edge_compute"]) == parts | {"full_pool_adapter_flops", "full_pool_block_flops"}
    assert value["seconds"] == {"wall": 12.5, "simulated": None}
    assert set(value["edges"][0]) == {
        "name", "mode", "bits", "batch_size", "ranks", "steps", "predicted_peak_bytes", "measured_peak_bytes", "active_share", "up_bytes",
        "down_bytes", "dropped_rounds", "first_round", "first_step_flops", "num_trainable", "under_training",
    }  # fmt: skip
    assert value["edges"][0]["first_step_flops"] == {"counted": 110, "formula": 100, "counted_head": 30, "formula_head": 30}
    assert value["edges"][1]["first_step_flops"] is None
    assert value["privacy"] is None
    assert set(value["versions"]) == {"atoll", "torch", "transformers", "peft", "flwr", "python"}


def test_rows_that_were_not_asked_for_are_absent() -> None:
    assert set(Summary("interrupted").to_json()["eval"]) == {"base", "adapted"}


@pytest.mark.parametrize("summary", [SUMMARY, Summary("failed"), Summary("complete", privacy=PrivacySpent(3.0, 1e-5))])
def test_what_is_written_is_read_back(tmp_path: Path, summary: Summary) -> None:
    write_summary(tmp_path / "summary.json", summary)
    assert read_summary(tmp_path / "summary.json") == summary


def test_a_loss_that_is_no_number_is_null(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", Summary("complete", Evaluation({"loss": math.nan})))
    read = read_summary(tmp_path / "summary.json").eval.base
    assert read == {"loss": None}


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**SUMMARY.to_json(), "carbon": 3}))
    assert read_summary(path) == SUMMARY


@pytest.mark.parametrize("text", ["", "[]", '{"status": "fine"}', '{"status": "complete", "edges": [{"name": "north"}]}'])
def test_a_summary_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(RunFolderError):
        read_summary(tmp_path / "summary.json")


def test_the_homogeneous_row_has_its_edges_and_time_beside_its_scores(tmp_path: Path) -> None:
    row = Homogeneous({"loss": 2.0}, ("north",), 12.5)
    summary = Summary("complete", Evaluation(homogeneous=row))
    write_summary(tmp_path / "summary.json", summary)
    value = json.loads((tmp_path / "summary.json").read_text())
    assert value["eval"]["homogeneous"] == {"loss": 2.0, "edges": ["north"], "simulated_seconds": 12.5}
    assert read_summary(tmp_path / "summary.json") == summary
