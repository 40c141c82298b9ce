"""Checkpoints are whole or absent, also when the process dies in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.runs.checkpoints import MANIFEST, damage, latest_checkpoint, write_checkpoint
from atoll.runs.layout import RunDirectory


def _fill(text: str) -> object:
    def write(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "state.bin").write_text(text)
        (folder / "adapter.bin").write_text(text * 2)

    return write


def test_a_checkpoint_holds_its_files_and_a_manifest(tmp_path: Path) -> None:
    path = write_checkpoint(RunDirectory(tmp_path), 3, _fill("abc"))
    assert path == tmp_path / "checkpoints" / "round-0003"
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["round"] == 3
    assert {name: entry["size_bytes"] for name, entry in manifest["files"].items()} == {"adapter.bin": 6, "deep/state.bin": 3}
    assert [entry.name for entry in path.parent.iterdir()] == ["round-0003"]


def test_the_latest_is_by_round_and_not_by_name_or_time(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert latest_checkpoint(run) is None
    for round in (2, 10000, 9999):
        write_checkpoint(run, round, _fill("x"))
    latest = latest_checkpoint(run)
    assert latest is not None
    assert latest.name == "round-10000"


def test_the_same_round_again_replaces_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_checkpoint(run, 1, _fill("old"))
    path = write_checkpoint(run, 1, _fill("new"))
    assert (path / "deep" / "state.bin").read_text() == "new"
    assert [entry.name for entry in run.checkpoints.iterdir()] == ["round-0001"]


@pytest.mark.parametrize("harm", ["changed", "cut", "gone", "more", "no manifest", "torn manifest", "other manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm: str) -> None:
    run = RunDirectory(tmp_path)
    first = write_checkpoint(run, 1, _fill("abc"))
    second = write_checkpoint(run, 2, _fill("abc"))
    state, manifest = second / "deep" / "state.bin", second / MANIFEST
    {
        "changed": lambda: state.write_text("abd"),
        "cut": lambda: state.write_text("ab"),
        "gone": state.unlink,
        "more": lambda: (second / "extra").write_text(""),
        "no manifest": manifest.unlink,
        "torn manifest": lambda: manifest.write_text(manifest.read_text()[:20]),
        "other manifest": lambda: manifest.write_text("[]"),
    }[harm]()
    assert damage(second) is not None
    assert latest_checkpoint(run) == first


def test_an_interrupt_while_writing_leaves_no_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)

    def interrupted(folder: Path) -> None:
        (folder / "adapter.bin").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(run, 1, interrupted)
    assert latest_checkpoint(run) is None
    write_checkpoint(run, 1, _fill("abc"))
    assert [entry.name for entry in run.checkpoints.iterdir()] == ["round-0001"], "the stage left behind is gone"


@pytest.mark.parametrize("moment", ["fsync", "replace", "rename"])
def test_a_process_killed_before_the_rename_leaves_the_checkpoint_before(tmp_path: Path, moment: str) -> None:
    code = """
import os, sys
from pathlib import Path
from atoll.runs.checkpoints import write_checkpoint
from atoll.runs.layout import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
write = lambda folder: (folder / "adapter.bin").write_text("abc")
write_checkpoint(run, 1, write)
setattr(os, sys.argv[2], lambda *arguments: os._exit(9))
write_checkpoint(run, 2, write)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path), moment], check=False).returncode == 9
    run = RunDirectory(tmp_path)
    latest = latest_checkpoint(run)
    assert latest is not None
    assert latest.name == "round-0001"
    assert write_checkpoint(run, 2, _fill("abc")) == latest_checkpoint(run)
