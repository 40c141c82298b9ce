"""Run directories: numbered, never shared, and found again."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atoll.errors import OutputError, RunFolderError
from atoll.runs import files
from atoll.runs.layout import RunDirectory, marked_run


def test_runs_are_numbered(tmp_path: Path) -> None:
    names = [RunDirectory.create(tmp_path / "runs", "clinics").path.name for _ in range(2)]
    assert names == ["clinics-0001", "clinics-0002"]
    (tmp_path / "runs" / "clinics-0041").mkdir()
    (tmp_path / "runs" / "clinics-old").mkdir()
    assert RunDirectory.create(tmp_path / "runs", "clinics").path.name == "clinics-0042"
    assert RunDirectory.create(tmp_path / "runs", "clin").path.name == "clin-0001"


def test_runs_that_start_at_once_get_their_own_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = [future.result().path for future in [pool.submit(RunDirectory.create, tmp_path, "a") for _ in range(24)]]
    assert sorted(path.name for path in paths) == [f"a-{number:04d}" for number in range(1, 25)]


def test_a_given_folder_must_be_absent_or_empty(tmp_path: Path) -> None:
    assert RunDirectory.create_at(tmp_path / "new" / "run").path.is_dir()
    assert RunDirectory.create_at(tmp_path / "new" / "run").path.is_dir()
    (tmp_path / "new" / "run" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError) as caught:
        RunDirectory.create_at(tmp_path / "new" / "run")
    assert "notes.txt" in caught.value.got
    with pytest.raises(OutputError):
        RunDirectory.create_at(tmp_path / "new" / "run" / "notes.txt")
    with pytest.raises(OutputError):
        RunDirectory.create(tmp_path / "new" / "run" / "notes.txt", "a")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o700), (0o000, 0o700), (0o277, 0o500)])
def test_a_run_is_for_its_user_alone_or_for_less_by_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    (tmp_path / "runs").mkdir()
    before = os.umask(umask)
    try:
        paths = [RunDirectory.create(tmp_path / "runs", "a").path, RunDirectory.create_at(tmp_path / "b").path]
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in paths] == [mode, mode]


def test_a_run_is_found_again(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "clinics")
    with pytest.raises(RunFolderError):
        RunDirectory.open(run.path)
    run.write_config("[run]\n", {"config": {"run": {"name": "clinics"}}})
    assert RunDirectory.open(run.path) == run
    assert run.read_config() == {"config": {"run": {"name": "clinics"}}}
    assert run.config_toml.read_text() == "[run]\n"


@pytest.mark.parametrize("wrong", ["clinics-0011", ".", "clinics-0001/adapter", "clinics"])
def test_a_wrong_folder_names_the_right_one(tmp_path: Path, wrong: str) -> None:
    run = RunDirectory.create(tmp_path, "clinics")
    run.write_config("", {})
    run.adapter.mkdir()
    with pytest.raises(RunFolderError) as caught:
        RunDirectory.open(tmp_path / wrong)
    assert caught.value.do == f"did you mean {run.path}?"


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_damaged_config_is_an_error(tmp_path: Path, content: str | None) -> None:
    run = RunDirectory(tmp_path)
    if content is not None:
        run.config_json.write_text(content)
    with pytest.raises(RunFolderError) as caught:
        run.read_config()
    assert caught.value.where == str(run.config_json)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.write_json(run.plan_json, {"edges": 1})

    def crash(*_arguments: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", crash)
        with pytest.raises(OSError, match="no space"):
            run.write_json(run.plan_json, {"edges": 2})
    assert run.plan_json.read_text() == '{\n  "edges": 1\n}\n'
    assert os.listdir(tmp_path) == ["plan.json"]


def test_an_exception_can_carry_the_folder(tmp_path: Path) -> None:
    error = KeyboardInterrupt()
    assert marked_run(error) is None
    RunDirectory(tmp_path).mark(error)
    assert marked_run(error) == tmp_path


def test_an_edge_has_its_own_adapter(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).edge_adapter("north") == tmp_path / "edges" / "north" / "adapter"
