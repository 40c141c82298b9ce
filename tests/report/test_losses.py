"""metrics.csv and report/loss.png: every run's numbers, as they were counted last."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from atoll.errors import RunFolderError
from atoll.report.runs.losses import write_losses
from atoll.runs.events import EdgeFinished, Evaluated, Event, EventLog, Resumed, RoundFinished, RunFinished, StepDone
from atoll.runs.layout import RunDirectory


def write(folder: Path, events: list[Event]) -> RunDirectory:
    run = RunDirectory.create_at(folder)
    with EventLog(run.events_path) as log:
        for event in events:
            log.append(event)
    return run


def a_round(number: int, loss: float, edges: tuple[str, ...] = ("north", "south"), steps: bool = True) -> list[Event]:
    events: list[Event] = []
    for edge in edges:
        if steps:
            events += [StepDone("federated", number, edge, 2 * number - 2 + step, loss, 1e-3, 0.5, 64, 32, 8) for step in (0, 1)]
        events.append(EdgeFinished("federated", number, edge, 2, loss, 100, 200, 10**9, 1.5))
    scored = Evaluated(f"round-{number}", {"loss": loss, "bleu": 3.0})
    return [*events, RoundFinished("federated", number, edges, 0.0, 100, 200, 2.0), scored]


def rows(run: RunDirectory) -> list[dict[str, str]]:
    with (run.path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_step_edge_round_and_scoring_has_its_line(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [Evaluated("base", {"loss": 5.0}), *a_round(1, 3.0), *a_round(2, 2.0), RunFinished("complete", 1.0)])
    (image,) = write_losses(run)
    found = rows(run)
    assert [(row["round"], row["edge"], row["step"], row["loss"]) for row in found if row["event"] == "step_done"][:3] == [
        ("1", "north", "0", "3.0"), ("1", "north", "1", "3.0"), ("1", "south", "0", "3.0"),
    ]  # fmt: skip
    assert [(row["row"], row["loss"], row["bleu"]) for row in found if row["event"] == "evaluated"] == [
        ("base", "5.0", ""), ("round-1", "3.0", "3.0"), ("round-2", "2.0", "3.0"),
    ]  # fmt: skip
    assert len(found) == 2 * (4 + 2 + 1 + 1) + 1
    assert image.read_bytes().startswith(b"\x89PNG")
    before = image.read_bytes()
    write_losses(run)
    assert image.read_bytes() == before, "equal logs give equal bytes"


def test_what_was_done_again_after_a_stop_is_there_once(tmp_path: Path) -> None:
    alone: list[Event] = [StepDone("local-only", 1, "north", 0, 9.0, 1e-3, 0.5, 64, 32, 8), Evaluated("federated", {"loss": 9.0})]
    first, last = [Evaluated("base", {"loss": 5.0}), *a_round(1, 3.0)], [*a_round(2, 2.0), Evaluated("federated", {"loss": 2.0})]
    run = write(tmp_path / "run", [*first, *a_round(2, 9.0), *alone, Resumed(1), *last])
    write_losses(run)
    whole = write(tmp_path / "whole", [*first, *last])
    write_losses(whole)
    assert [{**row, "time": ""} for row in rows(run)] == [{**row, "time": ""} for row in rows(whole)]


@pytest.mark.parametrize("number", [1, 3, 40])
def test_edges_whose_steps_nobody_sees_are_drawn_by_rounds(number: int, tmp_path: Path) -> None:
    names = tuple(f"edge-{one}" for one in range(number))
    run = write(tmp_path / "run", [*a_round(1, 3.0, names, steps=False), *a_round(2, 2.0, names, steps=False)])
    assert len(write_losses(run)) == 1


def test_a_run_without_numbers_has_a_header_and_no_figure(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [RunFinished("failed", 1.0)])
    assert write_losses(run) == ()
    assert rows(run) == []


def test_a_loss_that_is_no_number_is_empty(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [StepDone("federated", 1, "north", 0, math.nan, 1e-3, math.inf, 64, 32, 8), *a_round(2, 1.0)])
    write_losses(run)
    assert rows(run)[0]["loss"] == ""


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    run = write(tmp_path / "run", a_round(1, 1.0))
    run.events_path.write_text("{\n" + run.events_path.read_text())
    with pytest.raises(RunFolderError):
        write_losses(run)
