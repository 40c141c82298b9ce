"""A run that was stopped anywhere goes on, and comes to what it would have come to."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

import atoll
from atoll.adapters.peft_files import save_adapter
from atoll.adapters.state import AdapterState
from atoll.errors import AtollError, ConflictError, DiskError, ResumeError, RunFolderError
from atoll.federated.store import read_record
from atoll.jobs.split import HostAccess
from atoll.report.activity import read_activities
from atoll.runs.events import Advised, Event, EventLog, _write_whole

from tests.jobs.conftest import Workplace

TWO: dict[str, dict[str, object]] = {"north": {"bandwidth": "8 Mbit/s", "flops": "1 GFLOP/s"}, "south": {"rank": 2, "flops": "2 GFLOP/s"}}
CHOOSES: dict[str, dict[str, object]] = {
    "run": {"rounds": 3, "compare": ["central"]},
    "train": {"local_steps": 4, "optimizer_state": "keep", "schedule": "cosine"},
    "select": {"policy": "kill-and-revive", "every": 5, "observe_steps": 2, "keep": 0.5},
    "evaluate": {"every": 2},
}
PLANS: dict[str, dict[str, object]] = {
    "run": {"rounds": 3, "compare": ["homogeneous"]}, "federated": {"aggregation": "stack", "weigh": "steps"}, "adapter": {"dropout": 0.1},
    "plan": {"policy": "fedpipe", "warmup_steps": 2, "ranks": [2, 4], "bits": [16], "refresh": 2, "steps": "fill"},
}  # fmt: skip
GROWS: dict[str, dict[str, object]] = {
    "run": {"rounds": 3, "compare": ["local-only"]}, "plan": {"policy": "fedadapter", "ranks": [2, 4]},
    "train": {"optimizer_state": "keep"},
}  # fmt: skip
ADDS_UP: dict[str, dict[str, object]] = {"run": {"rounds": 3}, "federated": {"aggregation": "residual"}}


class Stop:
    """An observer that interrupts at the n-th event of a kind."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.left = kind, number

    def __call__(self, event: Event) -> None:
        self.left -= event.kind() == self.kind
        if self.left == 0:
            self.left = -1
            raise KeyboardInterrupt


def lines_of(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def outcome(run: Path) -> dict[str, object]:
    """All that must be the same: adapters and raw states byte for byte, the summary but for time and peak memory, the plan."""
    found: dict[str, object] = {}
    states = max((run / "checkpoints").glob("round-*")) / "state"
    adapters = [*run.glob("adapter/[!R]*"), *run.glob("edges/**/*.safetensors")]
    for path in sorted([*adapters, *states.rglob("*.state"), *states.rglob("steps.json")]):
        found[path.relative_to(run).as_posix()] = path.read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]["wall"]
    for edge in summary["edges"]:
        del edge["measured_peak_bytes"]
    found["summary"], found["plan"] = summary, json.loads((run / "plan.json").read_text())
    if (run / "importance.json").exists():
        found["importance"] = (run / "importance.json").read_bytes()
    return found


def stopped(config: Path, out: Path, stop: Callable[[Event], None]) -> Path:
    with pytest.raises(KeyboardInterrupt):
        atoll.train(config, out=out, observers=(stop,))
    assert not (out / "states").exists()
    return out


@pytest.mark.parametrize("sections", [CHOOSES, PLANS, GROWS, ADDS_UP], ids=["chooses", "plans", "grows", "adds-up"])
def test_stopped_at_every_kind_of_event_a_run_comes_to_the_same(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, sections: Mapping[str, Mapping[str, object]]
) -> None:
    monkeypatch.setattr("atoll.commands.train.write_figures", lambda run: ())  # Drawing takes longer than these runs.
    config = place.config(TWO if sections in (CHOOSES, ADDS_UP) else {"north": {}, "south": {}}, sections)
    whole = place.folder / "whole"
    atoll.train(config, out=whole)
    expected, counts = outcome(whole), dict[str, int]()
    for line in lines_of(whole):
        counts[str(line["event"])] = counts.get(str(line["event"]), 0) + 1
    del counts["run_finished"]  # Then the run is complete.
    for kind, count in counts.items():
        run = stopped(config, place.folder / kind, Stop(kind, (count + 1) // 2))
        rounds = len(list(run.glob("checkpoints/round-*")))
        result = atoll.resume(run)
        assert result.summary.status == "complete"
        assert outcome(run) == expected, kind
        resumed = [line["round"] for line in lines_of(run) if line["event"] == "resumed"]
        assert resumed == [rounds], kind
        shutil.rmtree(run)


def test_it_can_be_stopped_again_and_again(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.commands.train.write_figures", lambda run: ())
    config = place.config(TWO, CHOOSES)
    atoll.train(config, out=place.folder / "whole")
    run = stopped(config, place.folder / "run", Stop("step_done", 3))
    for number in (2, 7, 9):
        with pytest.raises(KeyboardInterrupt):
            atoll.resume(run, observers=(Stop("step_done", number),))
    atoll.resume(run)
    assert outcome(run) == outcome(place.folder / "whole")
    assert [line["round"] for line in lines_of(run) if line["event"] == "resumed"] == [0, 0, 0, 1]
    assert [line["row"] for line in lines_of(run) if line["event"] == "evaluated"][-1] == "central"
    activities = [read_activities(folder / "events.jsonl", {}) for folder in (run, place.folder / "whole")]
    assert activities[0] == activities[1], "what was decided twice counts once"
    assert activities[0]


def test_a_complete_run_stays_as_it_is(place: Workplace) -> None:
    done = place.train({}, {})
    before = {path: path.stat().st_mtime_ns for path in done.result.run_dir.rglob("*")}
    told: list[Event] = []
    result = atoll.resume(done.result.run_dir, observers=(told.append,))
    assert result.summary == done.result.summary
    assert [event.advice for event in told if isinstance(event, Advised)] == ["the run is complete: nothing is left to do"]
    assert {path: path.stat().st_mtime_ns for path in done.result.run_dir.rglob("*")} == before


def test_a_torn_line_is_cut_off_and_what_was_told_stays(place: Workplace) -> None:
    config = place.config(TWO, ADDS_UP)
    run = stopped(config, place.folder / "run", Stop("edge_finished", 3))
    told = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(told + b'{"time": "2026-01-01T00:00:00", "event": "step_do')
    atoll.resume(run)
    again = (run / "events.jsonl").read_bytes()
    assert again.startswith(told)
    assert json.loads(again[len(told) :].splitlines()[0])["event"] == "resumed"


def test_a_second_process_is_refused(place: Workplace) -> None:
    run = stopped(place.config({}, {}), place.folder / "run", Stop("step_done", 1))
    with EventLog(run / "events.jsonl"), pytest.raises(ResumeError, match="another process works on this run"):
        atoll.resume(run)
    assert atoll.resume(run).summary.status == "complete"


def test_the_last_two_checkpoints_are_kept_whole_and_of_older_ones_the_adapter(place: Workplace) -> None:
    run = place.train(TWO, {"run": {"rounds": 4}}).result.run_dir
    folders = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in folders] == [f"round-000{number}" for number in (1, 2, 3, 4)]
    assert [(path / "state").is_dir() for path in folders] == [False, False, True, True]
    assert all((path / "adapter_model.safetensors").is_file() for path in folders)
    assert (folders[-1] / "state").stat().st_mode & 0o077 == 0
    record = read_record(folders[-1] / "state" / "rounds" / "edges" / "1.state")
    assert record.metric_records["progress"]["step"] == 8


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda file: os.truncate(file, 100), "common.state has 100 of"),
    "deleted": (Path.unlink, "common.state is missing"),
    "flipped": (lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])), "holds other bytes"),
}


@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(place: Workplace, harm: str) -> None:
    config = place.config(TWO, ADDS_UP)
    atoll.train(config, out=place.folder / "whole")
    run = stopped(config, place.folder / "run", Stop("round_started", 3))
    act, says = DAMAGES[harm]
    act(run / "checkpoints" / "round-0002" / "state" / "rounds" / "common.state")
    atoll.resume(run)
    told = [line for line in lines_of(run) if line["event"] in ("resumed", "advised")]
    told = told[next(place for place, line in enumerate(told) if line["event"] == "resumed") :]
    assert told[0]["round"] == 1
    assert "round-0002" in str(told[1]["advice"])
    assert says in str(told[1]["advice"])
    assert outcome(run) == outcome(place.folder / "whole")


def test_without_a_whole_checkpoint_it_begins_again(place: Workplace) -> None:
    config = place.config(TWO, ADDS_UP)
    atoll.train(config, out=place.folder / "whole")
    run = stopped(config, place.folder / "run", Stop("round_started", 2))
    (run / "checkpoints" / "round-0001" / "manifest.json").unlink()
    atoll.resume(run)
    assert [line["round"] for line in lines_of(run) if line["event"] == "resumed"] == [0]
    assert outcome(run) == outcome(place.folder / "whole")


def _edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return act


CHANGES: dict[str, tuple[Callable[[Path], None], type[AtollError], str]] = {
    "config.toml": (_edit("config.toml", "rounds = 3", "rounds = 4"), ResumeError, "config.toml changed"),
    "config.json": (_edit("config.json", '"rounds": 3', '"rounds": 4'), ResumeError, "config.json changed"),
    "no hashes": (_edit("config.json", '"hashes"', '"hushes"'), ResumeError, "does not say what it began with"),
    "rows": (_edit("../rows.csv", "w0 w0", "w1 w0"), ResumeError, "rows changed"),
    "base": (lambda run: _flip(run / ".." / "base" / "model.safetensors"), ResumeError, "the base's weights changed"),
    "no run": (lambda run: (run / "config.json").unlink(), RunFolderError, "not a run directory"),
    "another run's checkpoint": (_edit("checkpoints/round-0001/state/run.json", '"hashes"', '"hashes": {}, "x"'), ResumeError, ""),
}


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_is_named_and_nothing_is_done(place: Workplace, change: str) -> None:
    shutil.copytree(place.base, place.folder / "base")
    config = place.config(TWO, {**ADDS_UP, "model": {"base": "./base"}})
    run = stopped(config, place.folder / "run", Stop("round_started", 2))
    act, kind, says = CHANGES[change]
    act(run)
    if change == "another run's checkpoint":
        manifest = json.loads((run / "checkpoints" / "round-0001" / "manifest.json").read_text())
        file = run / "checkpoints" / "round-0001" / "state" / "run.json"
        manifest["files"]["state/run.json"] = {
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size_bytes": file.stat().st_size,
        }  # fmt: skip
        (run / "checkpoints" / "round-0001" / "manifest.json").write_text(json.dumps(manifest))
        says = "a checkpoint is of another run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(kind) as caught:
        atoll.resume(run)
    assert caught.value.exit_status == 2
    assert says in caught.value.page()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_host_is_named_again_or_not_at_all(place: Workplace) -> None:
    run = stopped(place.config({}, {}), place.folder / "run", Stop("step_done", 1))
    with pytest.raises(ConflictError, match="goes on as it began"):
        atoll.resume(run, host=HostAccess("127.0.0.1:1"))


@pytest.mark.parametrize("where", ["fsync", "link", "event", "adapter"])
def test_a_full_disk_is_told_and_the_last_checkpoint_is_intact(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = place.config(TWO, ADDS_UP)
    atoll.train(config, out=place.folder / "whole")
    run, full = place.folder / "run", OSError(errno.ENOSPC, "No space left on device", "a file")

    def no_place(*_: object) -> None:
        raise full

    def fill(event: Event) -> None:
        if event.kind() == "round_started" and event.round == 2:  # type: ignore[attr-defined]
            match where:
                case "fsync":
                    monkeypatch.setattr(os, "fsync", no_place)
                case "link":
                    monkeypatch.setattr(os, "link", no_place)
                    monkeypatch.setattr(shutil, "copyfile", no_place)
                case "adapter":
                    monkeypatch.setattr("atoll.commands.train.save_adapter", cramped)
                case "event":
                    monkeypatch.setattr("atoll.runs.events._write_whole", no_place)

    def cramped(state: AdapterState, folder: Path, *, base_name: str, **form: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_adapter(state, folder, base_name=base_name, **form)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(DiskError) as caught:
        atoll.train(config, out=run, observers=(fill,))
    monkeypatch.undo()
    assert caught.value.exit_status == 4
    page = caught.value.page()
    says = "File too large" if where == "adapter" else "No space left"
    for words in ("a file of the run cannot be written", says, " free", "round-0001, and intact", f"atoll resume {run}"):
        assert words in page
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["round-0001"]
    assert not [path for path in run.rglob("*") if "stage" in path.name]
    atoll.resume(run)
    assert outcome(run) == outcome(place.folder / "whole")


def test_half_a_line_never_stays_in_the_log(tmp_path: Path) -> None:
    class Short(FileIO):
        """A file on a disk with place for ten bytes."""

        def write(self, data: bytes) -> int:  # type: ignore[override]
            return super().write(data[:10])

    path = tmp_path / "events.jsonl"
    path.write_bytes(b"{}\n")
    with Short(path, "ab") as file, pytest.raises(OSError, match="No space left"):
        _write_whole(file, b'{"event": "step_done"}\n')
    assert path.read_bytes() == b"{}\n"
