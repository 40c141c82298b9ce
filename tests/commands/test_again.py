"""A run trained again from its own folder: the same bits, wherever it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import atoll
from atoll.commands.train import example_prompt
from atoll.errors import ConflictError, DataFileError, ManyErrors, RunFolderError, TrustError
from atoll.runs.events import Advised, Event
from atoll.runs.layout import RunDirectory

from tests.conftest import write_job
from tests.run_files import Sections

ONE: Sections = {"run": {"rounds": 1}, "train": {"local_steps": 2}}


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a project: a base, rows, run.toml, and a run with an override."""
    folder = tmp_path_factory.mktemp("project")
    atoll.train(write_job(folder, ONE), out=folder / "runs" / "a-0001", overrides=["method=hetlora", "adapter.rank=3"])
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy at the place that its run knows."""
    kept = tmp_path / "kept"
    shutil.copytree(trained, kept)
    file = kept / "runs" / "a-0001" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "folder": str(kept)}))
    return kept


def test_a_run_keeps_what_was_typed(project: Path) -> None:
    noted = json.loads((project / "runs" / "a-0001" / "config.json").read_text())
    assert (noted["method"], noted["overrides"], noted["folder_from_run"]) == ("hetlora", ["method=hetlora", "adapter.rank=3"], "../..")
    assert noted["command"] is None, "a program called, and its arguments are its own"


def test_the_command_line_of_a_run_is_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/atoll", "train", "run.toml"])
    atoll.train(project / "run.toml", out=project / "typed")
    assert json.loads((project / "typed" / "config.json").read_text())["command"] == ["atoll", "train", "run.toml"]


def test_trained_again_it_has_the_same_bits_also_when_run_toml_changed_since(project: Path) -> None:
    (project / "run.toml").write_text("[run]\nrounds = 7\n")
    told: list[Event] = []
    result = atoll.train(project / "runs" / "a-0001", out=project / "again", observers=[told.append])
    assert weights(result.run_dir) == weights(project / "runs" / "a-0001")
    assert not [event for event in told if isinstance(event, Advised) and "a-0001" in event.advice]
    noted = json.loads((project / "again" / "config.json").read_text())
    assert (noted["repeats"], noted["method"], noted["overrides"]) == ("a-0001", "hetlora", ["method=hetlora", "adapter.rank=3"])
    thrice = atoll.train(project / "again", out=project / "thrice")
    assert weights(thrice.run_dir) == weights(result.run_dir)


def test_another_seed_is_another_run_with_the_rest_as_it_was(project: Path) -> None:
    result = atoll.train(project / "runs" / "a-0001", out=project / "again", overrides=["run.seed=1"])
    before, after = (json.loads((path / "config.json").read_text())["config"] for path in (project / "runs" / "a-0001", result.run_dir))
    assert after == {**before, "run": {**before["run"], "seed": 1}}
    assert weights(result.run_dir) != weights(project / "runs" / "a-0001")


def test_moved_with_its_data_it_is_found_there(project: Path, tmp_path: Path) -> None:
    moved = project.rename(tmp_path / "moved")
    result = atoll.train(moved / "runs" / "a-0001", out=tmp_path / "again")
    assert weights(result.run_dir) == weights(moved / "runs" / "a-0001")
    assert atoll.evaluate(run_dir=moved / "runs" / "a-0001")["adapted"]


def test_moved_alone_it_finds_its_data_where_they_were(project: Path, tmp_path: Path) -> None:
    run = (project / "runs" / "a-0001").rename(tmp_path / "elsewhere")
    assert weights(atoll.train(run, out=tmp_path / "again").run_dir) == weights(run)


def test_data_that_are_gone_are_named_and_nothing_is_written(project: Path) -> None:
    (project / "rows.jsonl").rename(project / "moved.jsonl")
    with pytest.raises(DataFileError):
        atoll.train(project / "runs" / "a-0001", out=project / "again")
    assert not (project / "again").exists()
    moved = project / "moved.jsonl"
    result = atoll.train(project / "runs" / "a-0001", out=project / "again", overrides=[f"data.train={moved}", f"data.eval={moved}"])
    assert weights(result.run_dir) == weights(project / "runs" / "a-0001")


def test_what_changed_since_is_told(project: Path) -> None:
    rows = (project / "rows.jsonl").read_text().splitlines()
    (project / "rows.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    file = project / "runs" / "a-0001" / "config.json"
    noted = json.loads(file.read_text())
    file.write_text(json.dumps({**noted, "versions": {**noted["versions"], "torch": "1.0"}}))
    told: list[Event] = []
    atoll.train(project / "runs" / "a-0001", out=project / "again", observers=[told.append])
    advice = [event.advice for event in told if isinstance(event, Advised) and event.advice.startswith("not a-0001 to the last bit")]
    assert len(advice) == 3
    for words in ("other rows of north, south", "held-out rows", "in place of 1.0"):
        assert any(words in one for one in advice)


@pytest.mark.parametrize("harm", ["{", "{}", '{"config": {}}', '{"config": {"run": {"speed": 1}}, "folder": "."}'])
def test_a_damaged_folder_or_one_of_another_version_is_named(harm: str, project: Path) -> None:
    (project / "runs" / "a-0001" / "config.json").write_text(harm)
    with pytest.raises(RunFolderError):
        atoll.train(project / "runs" / "a-0001", out=project / "again")
    assert not (project / "again").exists()


def test_wrong_overrides_are_refused_as_of_a_file(project: Path) -> None:
    with pytest.raises(ManyErrors):
        atoll.train(project / "runs" / "a-0001", out=project / "again", overrides=["run.sed=1", "train.batch_size=0"])


def test_code_of_somebody_else_waits_for_trust(project: Path) -> None:
    (project / "mine_again.py").write_text(
        "class Quiet:\n    def start(self, run): pass\n"
        "    def event(self, event): pass\n    def finish(self, status): pass\n"
    )
    config = (project / "run.toml").read_text() + '[track]\nto = ["mine_again:Quiet"]\n'
    (project / "run.toml").write_text(config)
    run = atoll.train(project / "run.toml", out=project / "tracked").run_dir
    with pytest.raises(TrustError):
        atoll.train(run, out=project / "again")
    with pytest.raises(TrustError):
        atoll.plan(run)
    assert atoll.train(run, out=project / "again", trust=True).summary.status == "complete"


def test_a_run_of_a_host_or_a_fleet_is_not_repeated_without(project: Path) -> None:
    file = project / "runs" / "a-0001" / "config.json"
    noted = json.loads(file.read_text())
    for key, value, words in (("has_host", True, "--host"), ("run_id", "abc", "--engine flower")):
        file.write_text(json.dumps({**noted, key: value}))
        with pytest.raises(ConflictError) as caught:
            atoll.train(project / "runs" / "a-0001", out=project / "again")
        assert words in caught.value.do


def test_the_plan_of_a_run_is_that_of_its_config(project: Path) -> None:
    plan = atoll.plan(project / "runs" / "a-0001")
    assert {rank for edge in plan.edges for rank in edge.ranks.values()} == {3}


def test_an_example_prompt_does_not_need_the_data(project: Path) -> None:
    run = project / "runs" / "a-0001"
    assert example_prompt(run) == "w0 w1"
    (project / "rows.jsonl").unlink()
    assert example_prompt(run) == "..."
    assert RunDirectory.open(run).path == run
