"""Policies and placements from run.toml to summary, figures and events: every comparison is one switch."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from atoll.commands.edge import edge
from atoll.commands.plan import plan
from atoll.commands.train import RunResult, train
from atoll.errors import ConflictError
from atoll.jobs.split import HostAccess
from atoll.registry.parts import names
from atoll.runs.events import read_events

from tests.conftest import save_model_folder
from tests.run_files import Sections, merged, write_run

SECTIONS: Sections = {
    "model": {"cut": {"front": 0, "back": 0}}, "adapter": {"targets": ["q_proj", "k_proj", "v_proj"], "rank": 2},
    "data": {"train": "train.csv", "eval": "train.csv", "prompt": "{q} ->", "completion": " {a}", "max_length": None},
    "wire": {"mode": "dense"}, "select": {"keep": 0.34, "observe_steps": 2, "every": 8},
    "train": {"learning_rate": None, "batch_size": 4, "local_steps": 10},
}  # fmt: skip
POLICIES = list(names("policy"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "base", "llama")
    rows = [f"{letter * 3} {number},{letter}{number}" for number, letter in enumerate("abcdefghijklmnop")]
    (tmp_path / "train.csv").write_text("q,a\n" + "\n".join(rows) + "\n")
    return write_run(tmp_path, SECTIONS, {})


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
    assert bool([figure for figure in split.figures if figure.stem != "loss"]) == (policy != "all")
    frames = sum({**traffic.up_bytes_by_kind, **traffic.down_bytes_by_kind}.values())  # type: ignore[dict-item]
    # Rows of this tiny base are a few hundred bytes, and every message has a header of some eighty.
    assert 1.0 < frames / traffic.formula_shared_bytes < 2.5


def test_what_is_written_is_what_the_formula_says(config: Path) -> None:
    """Two steps of rows that are longer, so that headers hardly count: with killed modules sent at every segment."""
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
    advice = [event["advice"] for event in events if event["event"] == "advised" and "windows" in str(event["advice"])]
    assert len(advice) == 1
    assert "30.0% of 20 steps are in windows" in str(advice[0])


def test_a_window_without_an_end_is_refused_before_anything_is_written(config: Path) -> None:
    settings = ['select.policy="kill-and-revive"', "select.every=2"]
    with pytest.raises(ConflictError, match="no shorter than its period"):
        train(config, out=config.parent / "out", overrides=settings)
    with pytest.raises(ConflictError, match="no shorter than its period"):
        plan(config, overrides=['select.policy="kill-and-revive"', 'select.every="epoch"', "select.observe_steps=4"])
    assert not (config.parent / "out").exists()


def test_the_comparison_with_all_rows_can_have_a_schedule_too(config: Path) -> None:
    """Of many rows an automatic window is longer; that is found before the edges are trained."""
    rows = "\n".join(f"{number},{number}" for number in range(600))
    for name in ("a", "b"):
        (config.parent / f"{name}.csv").write_text(f"q,a\n{rows}\n")
    changed = merged(SECTIONS, {"select": {"observe_steps": None, "every": 13}, "train": {"batch_size": 1}})
    write_run(config.parent, changed, {name: {"data": f"{name}.csv"} for name in ("a", "b")})
    settings = ['select.policy="kill-and-revive"']
    assert len(plan(config, overrides=settings).edges) == 2
    with pytest.raises(ConflictError, match="no shorter than its period"):
        train(config, out=config.parent / "out", overrides=[*settings, 'run.compare=["central"]'])
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize("placement", ["local", "cloud"])
def test_an_edge_with_a_host_does_not_train_elsewhere(placement: str, config: Path) -> None:
    with pytest.raises(ConflictError, match="not to train against a host"):
        edge(config, HostAccess("127.0.0.1:1"), overrides=[f'run.placement="{placement}"'])


def test_what_cannot_be_merged_is_refused_where_it_would_be(config: Path) -> None:
    merging = ["select.killed=merge", "model.precision=bf16"]
    with pytest.raises(ConflictError, match="rounds away"):
        plan(config, overrides=["select.policy=snip", *merging])
    assert plan(config, overrides=merging).edges, "where every module is trained, nothing is merged"


def test_a_figure_that_cannot_be_written_takes_nothing_away(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(run: object) -> tuple[Path, ...]:
        raise OSError("No space left on device")

    monkeypatch.setattr("atoll.commands.train.write_figures", full)
    result = run(config, select__policy="snip")
    assert (result.summary.status, result.figures) == ("complete", ())
    assert list(read_events(result.run_dir / "events.jsonl"))[-1]["event"] == "advised"


def test_simulated_time_counts_the_round_trips_of_active_modules(config: Path) -> None:
    """Latency alone is declared: 10 ms each way. Two blocks with one group each; the last layers are one, whose segment begins anew with
    each of 2 rounds of 10 steps: the other's modules are sent, where they are not skipped.
    """
    write_run(config.parent, merged(SECTIONS, {"train": {"accumulate": 2}}), {"north": {"latency": "10 ms"}})

    def simulated(**settings: str) -> float | None:
        return run(config, **settings).summary.seconds.simulated

    every, last = (simulated(run__placement="split", select__policy=policy) for policy in ("all", "last-layers"))
    skipped = simulated(run__placement="split", select__policy="last-layers", select__killed="skip")
    assert every == pytest.approx(2 * 0.010 * 2 * (1 + 10 * 2 * (2 * 2 + 1)))
    assert last == pytest.approx(2 * 0.010 * 2 * (1 + 1 + 10 * 2 * (2 * 1 + 1)))
    assert skipped == pytest.approx(2 * 0.010 * 2 * (1 + 10 * 2 * (2 * 1 + 1)))
    assert simulated(run__placement="local") == pytest.approx(2 * 0.010 * 2)
