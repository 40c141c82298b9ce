"""Policies and placements from run.toml to summary, figures and events: every comparison is one switch."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from atoll.commands.train import RunResult, train
from atoll.config.schema import Select
from atoll.errors import ConflictError
from atoll.runs.events import read_events

from tests.conftest import save_model_folder

RUN = """
[run]
rounds = 2
[model]
base = "model"
cut = { front = 0, back = 0 }
[data]
train = "train.csv"
eval = "train.csv"
prompt = "{q} ->"
completion = " {a}"
[adapter]
targets = ["q_proj", "k_proj", "v_proj"]
rank = 2
[select]
keep = 0.34
observe_steps = 2
every = 8
[train]
batch_size = 4
local_steps = 10
"""
POLICIES = list(Select.model_fields["policy"].annotation.__args__)  # type: ignore[union-attr]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "model", "llama")
    rows = [f"{letter * 3} {number},{letter}{number}" for number, letter in enumerate("abcdefghijklmnop")]
    (tmp_path / "train.csv").write_text("q,a\n" + "\n".join(rows) + "\n")
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def run(config: Path, **settings: str) -> RunResult:
    overrides = [f'{key.replace("__", ".")}="{value}"' for key, value in settings.items()]
    return train(config, out=config.parent / "-".join(["out", *settings.values()]), overrides=overrides)


@pytest.mark.parametrize("policy", POLICIES)
def test_split_is_local_with_less_on_the_device(policy: str, config: Path) -> None:
    local, split = (run(config, select__policy=policy, run__placement=placement) for placement in ("local", "split"))
    assert split.summary.eval.adapted is not None
    assert local.summary.eval.adapted is not None
    assert split.summary.eval.adapted["loss"] == pytest.approx(local.summary.eval.adapted["loss"], rel=1e-4)
    assert [edge.active_share for edge in split.summary.edges] == [edge.active_share for edge in local.summary.edges]
    traffic, compute = split.summary.traffic, split.summary.edge_compute
    assert traffic.formula_shared_bytes is not None
    assert traffic.full_pool_shared_bytes is not None
    assert (traffic.formula_shared_bytes < traffic.full_pool_shared_bytes) == (policy != "all")
    assert (compute.adapter_flops < compute.full_pool_adapter_flops) == (policy != "all")
    assert bool(split.figures) == (policy != "all")
    frames = sum({**traffic.up_bytes_by_kind, **traffic.down_bytes_by_kind}.values())  # type: ignore[dict-item]
    # Rows of this tiny base are a few hundred bytes, and every message has a header of some eighty.
    assert 1.0 < frames / traffic.formula_shared_bytes < 2.5


def test_what_is_written_is_what_the_formula_says(config: Path) -> None:
    """Two steps of rows that are longer, so that headers hardly count: with killed modules handed over at every stretch."""
    long = [f"{'x y ' * 50} {number},{'a b ' * 9}{number}" for number in range(8)]
    (config.parent / "train.csv").write_text("q,a\n" + "\n".join(long) + "\n")
    for wire in ("dense", "factored"):
        traffic = run(config, select__policy="kill-and-revive", run__placement="split", wire__mode=wire).summary.traffic
        written = sum(itertools.chain(traffic.up_bytes_by_kind.values(), traffic.down_bytes_by_kind.values()))  # type: ignore[union-attr]
        assert traffic.formula_shared_bytes is not None
        assert 1.0 < written / traffic.formula_shared_bytes < 1.25


def test_cloud_only_hands_over_its_rows_and_trains_nothing(config: Path) -> None:
    local, cloud = (run(config, run__placement=placement) for placement in ("local", "cloud"))
    assert cloud.summary.eval == local.summary.eval
    assert cloud.summary.edge_compute.flops == 0
    assert local.summary.edge_compute.flops > 0
    assert 0.5 < cloud.summary.traffic.up_bytes / (config.parent / "train.csv").stat().st_size < 4
    assert [edge.measured_peak_bytes for edge in cloud.summary.edges] == [None]


def test_every_change_is_an_event(config: Path) -> None:
    result = run(config, select__policy="kill-and-revive")
    events = list(read_events(result.run_dir / "events.jsonl"))
    chosen = [event for event in events if event["event"] == "modules_chosen"]
    assert [(event["step"], event["reason"]) for event in chosen] == [
        (0, "window"), (2, "choice"), (8, "window"), (10, "choice"), (16, "window"), (18, "choice"),
    ]  # fmt: skip
    assert [event["num_active"] for event in events if event["event"] == "step_done"] == [6, 6, *[2] * 6] * 2 + [6, 6, 2, 2]
    advice = [event["advice"] for event in events if event["event"] == "advised"]
    assert len(advice) == 1
    assert "30.0% of 20 steps are in windows" in str(advice[0])


def test_a_window_without_an_end_is_refused_before_anything_is_written(config: Path) -> None:
    with pytest.raises(ConflictError, match="no shorter than its period"):
        train(config, out=config.parent / "out", overrides=['select.policy="kill-and-revive"', "select.every=2"])
    assert not (config.parent / "out").exists()
