"""The event log: one whole line an event, whatever happens."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from atoll.errors import RunFolderError
from atoll.runs import events
from atoll.runs.events import EdgeDropped, Evaluated, Event, EventLog, RunStarted, StepDone, read_events

STEP = StepDone("federated", 1, "north", 3, 2.5, 1e-3, 0.7, 100, 40, 21)
DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_an_event_is_a_line_with_its_time_its_name_and_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append(RunStarted("clinics-0001", 0, 3, ("north", "söuth")))
        log.append(STEP)
        assert len(list(read_events(path))) == 2, "a line is on disk before the log is closed"
    first, second = read_events(path)
    assert datetime.fromisoformat(str(first.pop("time"))).utcoffset() is not None
    assert first == {"event": "run_started", "name": "clinics-0001", "seed": 0, "rounds": 3, "edges": ["north", "söuth"]}
    assert (second["event"], second["loss"], second["edge"]) == ("step_done", 2.5, "north")


def test_observers_see_events_after_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    seen: list[tuple[Event, int]] = []
    with EventLog(path, [lambda event: seen.append((event, len(list(read_events(path)))))]) as log:
        log.append(STEP)
    assert seen == [(STEP, 1)]


def test_a_log_without_a_file_only_tells_observers() -> None:
    seen: list[Event] = []
    with EventLog(None, [seen.append]) as log:
        log.append(STEP)
    assert seen == [STEP]


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append(Evaluated("base", {"loss": math.nan, "perplexity": math.inf}))
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line["metrics"] == {"loss": None, "perplexity": None}


def test_a_torn_last_line_is_left_out_and_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append(STEP)
    path.write_bytes(path.read_bytes() + b'{"time": "2026-01-01T0')
    assert len(list(read_events(path))) == 1
    with EventLog(path) as log:
        log.append(EdgeDropped(2, "north", "late"))
    assert [event["event"] for event in read_events(path)] == ["step_done", "edge_dropped"]


def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "a"}\nnonsense\n{"event": "b"}\n')
    with pytest.raises(RunFolderError) as caught:
        list(read_events(path))
    assert caught.value.where.endswith("events.jsonl, line 2")


def test_a_process_that_is_killed_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = "import os, sys; from pathlib import Path; from atoll.runs.events import *; log = EventLog(Path(sys.argv[1]))\n"
    code += "for round in range(50): log.append(EdgeDropped(round, 'north', 'x'))\nos._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert [event["round"] for event in read_events(path)] == list(range(50))


def test_the_page_lists_every_event_with_its_fields() -> None:
    page = (DOCS / "run-directory.md").read_text(encoding="utf-8")
    kinds = {
        kind.kind(): kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
    }
    assert len(kinds) == 18
    for name, kind in kinds.items():
        assert f"| `{name}` | {', '.join(f'`{field}`' for field in kind.__dataclass_fields__)} |" in page
