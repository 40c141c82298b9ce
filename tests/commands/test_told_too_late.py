"""Whoever ends a run that is complete ends nothing of it: the result is there, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import atoll
from atoll.commands import train
from atoll.fleet.train import _result_kept
from atoll.runs.events import Event, RunFinished
from atoll.runs.layout import RunDirectory, marked_run

from tests.run_files import DEMO, PAIR, merged, write_run

SMALL = merged(DEMO, {"run": {"rounds": 1}, "data": {"train_rows": 16, "max_length": 64}, "train": {"batch_size": 2, "local_steps": 1}})


def interrupts(*given: object) -> None:
    raise KeyboardInterrupt


def when_finished(event: Event) -> None:
    if isinstance(event, RunFinished):
        raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["as it is told", "while the model card is written"])
def test_the_result_of_a_complete_run_is_returned(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observers: list[Callable[[Event], None]] = [when_finished] if place == "as it is told" else []
    if not observers:
        monkeypatch.setattr(train, "write_card", interrupts)
    result = atoll.train(write_run(tmp_path, SMALL, PAIR, over={}), out=tmp_path / "run", observers=observers)
    assert result.summary.status == "complete"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "complete"
    assert (result.adapter / "adapter_model.safetensors").is_file()


def test_a_fleet_that_is_told_to_end_while_it_ends_gives_its_result() -> None:
    told: list[str] = []
    result: train.RunResult = object()  # type: ignore[assignment]
    with _result_kept(told.append) as kept:
        kept.append(result)
        raise KeyboardInterrupt
    assert kept == [result]
    assert "the run is complete" in told[0]
    with pytest.raises(KeyboardInterrupt), _result_kept(told.append):
        raise KeyboardInterrupt


def test_what_interrupts_the_end_of_an_interrupted_run_still_says_where_the_work_is(tmp_path: Path) -> None:
    """As when Ctrl-C is pressed twice."""
    first, second = KeyboardInterrupt(), KeyboardInterrupt()
    RunDirectory(tmp_path / "run").mark(first)
    second.__context__ = first
    assert marked_run(second) == tmp_path / "run"
    assert marked_run(KeyboardInterrupt()) is None
