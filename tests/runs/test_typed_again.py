"""What has to be typed to go on with a run, or to train it again: with the options that it began with, wherever it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.runs.record import again_with, go_on_with

RUN = Path("runs/a-0001")
TLS = ["--ca", "ca.pem", "--cert=me.pem", "--key", "me.key"]


def noted(folder: Path, *typed: str, on_fleet: bool = False) -> dict[str, object]:
    return {
        "command": ["atoll", "train", *typed], "started_in": str(folder), "folder": str(folder),
        "overrides": ["method=fedpipe", "run.seed=1"], "method": "fedpipe", "run_id": "abc" if on_fleet else "",
    }  # fmt: skip


@pytest.mark.parametrize(("typed", "on_fleet", "options"), [
    (["run.toml", "--set", "run.seed=1", "--out", "x"], False, []),
    (["run.toml", "--host", "gpu:7431", *TLS], False, ["--host", "gpu:7431", "--ca", "ca.pem", "--cert", "me.pem", "--key", "me.key"]),
    (["--host=gpu:7431", "--insecure", "run.toml"], False, ["--host", "gpu:7431", "--insecure"]),
    (["run.toml", "--engine", "flower", "--fleet", "."], True, ["--engine", "flower", "--fleet", "."]),
    (["--fleet=coordinator", "run.toml", "--engine=flower"], True, ["--fleet", "coordinator", "--engine", "flower"]),
])  # fmt: skip
def test_the_options_go_along(
    typed: list[str], on_fleet: bool, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = noted(tmp_path, *typed, on_fleet=on_fleet)
    monkeypatch.chdir(tmp_path)
    assert go_on_with(RUN, known) == ("atoll", "resume", str(RUN), *options)
    assert again_with(RUN, known) == ("atoll", "train", str(RUN), *options)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    far = [str(tmp_path / word) if word.endswith((".pem", ".key", "coordinator")) else word for word in options]
    far = [str(tmp_path) if word == "." else word for word in far]
    assert again_with(RUN, known) == ("atoll", "train", str(RUN), *far)


def test_edges_that_ended_with_their_run_are_started_again_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = noted(tmp_path, "--method", "fedpipe", "little.toml", "--engine", "flower", "--set", "run.seed=1", on_fleet=True)
    monkeypatch.chdir(tmp_path)
    assert go_on_with(RUN, known) is None
    again = ("atoll", "train", str(tmp_path / "little.toml"), "--engine", "flower", "--method", "fedpipe", "--set", "run.seed=1")
    assert again_with(RUN, known) == again
    assert again_with(RUN, {**known, "folder": "/moved"}) is None
    assert again_with(RUN, {**known, "command": None}) is None


def test_an_older_run_without_any_of_it_is_trained_again_by_its_folder() -> None:
    assert again_with(RUN, {}) == ("atoll", "train", str(RUN))
    assert go_on_with(RUN, {"command": "damaged", "started_in": 3}) == ("atoll", "resume", str(RUN))
