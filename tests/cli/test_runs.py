"""Runs as things: listed, shown, compared and removed, whatever state their folders are in."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.runs.events import Evaluated, EventLog, RunFinished, RunStarted
from atoll.runs.layout import WRITTEN, RunDirectory
from atoll.runs.summary import Durations, EdgeSummary, Evaluation, Summary, Traffic, write_summary

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"run": {"name": "a", "seed": 0, "rounds": 2}, "model": {"base": "tiny"}, "edge": [{"name": "north", "rank": None}]}


def make_run(into: Path, name: str, status: str | None = "complete", loss: float = 1.5, **noted: object) -> Path:
    """A run's folder, as a run writes it; without a status its process was killed."""
    run = RunDirectory.create_at(into / name)
    kept = {"config": CONFIG, "folder": str(into), "hashes": {"base_hash": "a" * 64}, "versions": {"atoll": "1"}, **noted}
    run.write_config("", kept)
    with EventLog(run.events_path) as log:
        log.append(RunStarted(name, 0, 2, ("north",)))
        log.append(Evaluated("base", {"loss": 4.0}))
        if status is not None:
            log.append(RunFinished("complete", 3.0))
    if status is not None:
        edge = EdgeSummary("north", "local", 32, 8, {}, 10, 2_000_000, 1_000_000, 1.0, 100, 200, 0)
        evaluation = Evaluation({"loss": 4.0, "num_rows": 4}, {"loss": loss, "num_rows": 4})
        summary = Summary(status, evaluation, Traffic(100, 200), seconds=Durations(3.0), edges=(edge,))  # type: ignore[arg-type]
        write_summary(run.summary_path, summary)
    return run.path


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Four runs in `runs`."""
    make_run(tmp_path / "runs", "a-0001", method="fedpipe", overrides=["method=fedpipe"], command=["atoll", "train", "run.toml"])
    make_run(tmp_path / "runs", "a-0002", "interrupted")
    make_run(tmp_path / "runs", "a-0003", None)
    make_run(tmp_path / "runs", "a-0004", loss=1.25, config={**CONFIG, "run": {**CONFIG["run"], "seed": 1}})  # type: ignore[dict-item]
    return tmp_path / "runs"


def test_a_list_has_every_run_with_its_method_status_losses_and_time(atoll: Callable[..., object], shelf: Path) -> None:
    outcome = atoll("runs")
    assert (outcome.status, outcome.err) == (0, "")
    assert [line.split()[:5] for line in outcome.out.splitlines()[3:]] == [
        ["a-0001", "complete", "fedpipe", "tiny", "4.000"], ["a-0002", "interrupted", "-", "tiny", "4.000"],
        ["a-0003", "stopped", "-", "tiny", "-"], ["a-0004", "complete", "-", "tiny", "4.000"],
    ]  # fmt: skip
    assert re.search(r"4\.000 -> 1\.500 +20\d\d-\d\d-\d\d \d\d:\d\d$", outcome.out.splitlines()[3])
    found = json.loads(atoll("runs", "--json", "--last", 1).out)
    assert [(one["name"], one["loss_before"], one["loss_after"], one["seed"]) for one in found] == [("a-0004", 4.0, 1.25, 1)]


def test_what_is_no_run_is_not_listed_and_what_cannot_be_read_is_named(atoll: Callable[..., object], shelf: Path) -> None:
    (shelf / "notes").mkdir()
    (shelf / "notes.txt").write_text("x")
    (shelf / "model").mkdir()
    (shelf / "model" / "config.json").write_text('{"model_type": "llama"}')
    RunDirectory.create(shelf, "b").path.joinpath("config.toml").write_text("")
    for number, text in enumerate(("{", "[]", '{"config": 3}', "\x00", '{"config": {"edge": [3]}}'), start=1):
        (make_run(shelf, f"d-000{number}") / "config.json").write_text(text)
    for name, text in (("e-0001", "{"), ("e-0002", '{"status": [], "eval": 3, "edges": {}}')):
        (make_run(shelf, name) / "summary.json").write_text(text)
    (make_run(shelf, "e-0003") / "events.jsonl").write_bytes(b"\xff" * 100_000)
    found = {one["name"]: (one["status"], one["problem"]) for one in json.loads(atoll("runs", "--json").out)}
    assert {name: status for name, (status, _) in found.items() if name[0] in "bde"} == {
        "b-0001": "half-written", "d-0001": "unreadable", "d-0002": "unreadable", "d-0003": "complete", "d-0004": "unreadable",
        "d-0005": "complete", "e-0001": "stopped", "e-0002": "stopped", "e-0003": "complete",
    }  # fmt: skip
    assert "config.json cannot be read" in found["d-0001"][1]
    assert "summary.json cannot be read" in found["e-0001"][1]
    assert not {"notes", "model"} & set(found)
    assert "d-0001: config.json cannot be read" in atoll("runs").out
    for name in ("d-0003", "d-0005", "e-0001", "e-0002", "e-0003"):
        assert atoll("runs", "show", name).status == 0
        assert atoll("runs", "compare", name, "a-0001").status == 0


def test_a_folder_without_runs_says_so_and_one_that_is_not_there_is_refused(atoll: Callable[..., object], tmp_path: Path) -> None:
    assert (atoll("runs").status, atoll("runs").out) == (0, "no runs in runs; `atoll train RUN.toml` writes one\n")
    assert atoll("runs", "--json").out == "[]\n"
    assert "R501" in atoll("runs", "--dir", "elsewhere").err
    run = make_run(tmp_path / "runs", "a-0001")
    assert "atoll runs show" in atoll("runs", "--dir", run).err


def test_one_run_is_shown_by_name_or_path_with_what_to_do(atoll: Callable[..., object], shelf: Path) -> None:
    outcome = atoll("runs", "show", "a-0001")
    assert (outcome.status, atoll("runs", "show", shelf / "a-0001").status) == (0, 0)
    shown = [" ".join(line.split()) for line in outcome.out.splitlines()]
    for line in ("status complete", "command atoll train run.toml", "method fedpipe", "again atoll train runs/a-0001", "base 4.000"):
        assert line in shown
    assert "atoll resume runs/a-0002" in atoll("runs", "show", "a-0002").out
    value = json.loads(atoll("runs", "show", "a-0001", "--json").out)
    assert (value["summary"]["status"], value["config"], value["overrides"]) == ("complete", CONFIG, ["method=fedpipe"])
    assert "did you mean a-0001?" in atoll("runs", "show", "a-001").err
    assert atoll("runs", "show", "a-001").status == 2


def test_runs_side_by_side(atoll: Callable[..., object], shelf: Path) -> None:
    value = json.loads(atoll("runs", "compare", "a-0001", "a-0004", "a-0003", "--json").out)
    assert value["runs"] == ["a-0001", "a-0004", "a-0003"]
    assert value["config"] == {"method": ["fedpipe", None, None], "run.seed": [0, 1, 0]}
    assert value["figures"]["adapted loss"] == [1.5, 1.25, None]
    assert value["figures"]["up_bytes"] == [100, 100, None]
    assert value["figures"]["status"] == ["complete", "complete", "stopped"]
    lines = [" ".join(line.split()) for line in atoll("runs", "compare", "a-0001", "a-0004").out.splitlines()]
    assert {"run.seed 0 1", "adapted loss 1.500 1.250", "sent by edges 100 B 100 B", "memory, most of an edge 1 MB 1 MB"} <= set(lines)
    assert "the settings are the same" in atoll("runs", "compare", "a-0003", "a-0002").out
    assert "C107" in atoll("runs", "compare", "a-0001").err


def test_names_that_are_the_same_are_told_by_their_paths(atoll: Callable[..., object], shelf: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "elsewhere", "a-0001")
    assert json.loads(atoll("runs", "compare", "a-0001", other, "--json").out)["runs"] == ["runs/a-0001", str(other)]


def test_a_run_is_removed_whole_and_the_others_stay(atoll: Callable[..., object], shelf: Path) -> None:
    outcome = atoll("runs", "rm", "a-0001", shelf / "a-0003", "a-0001", "--yes")
    assert (outcome.status, outcome.out.splitlines()) == (0, ["removed runs/a-0001", f"removed {shelf / 'a-0003'}"])
    assert sorted(os.listdir(shelf)) == ["a-0002", "a-0004"]
    RunDirectory.create(shelf, "b")
    assert atoll("runs", "rm", "b-0001", "--yes").status == 0


def test_without_a_terminal_yes_must_be_said(atoll: Callable[..., object], shelf: Path) -> None:
    outcome = atoll("runs", "rm", "a-0001")
    assert outcome.status == 2
    assert "--yes" in outcome.err
    assert (shelf / "a-0001").is_dir()


@pytest.mark.parametrize("answer", ["y\n", "n\n"])
def test_a_person_is_asked(answer: str, atoll: Callable[..., object], shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: answer.strip())
    outcome = atoll("runs", "rm", "a-0001")
    assert outcome.status == 0
    assert (shelf / "a-0001").exists() == (answer == "n\n")
    assert "runs/a-0001" in outcome.err


def strange(shelf: Path) -> dict[str, tuple[Path, str]]:
    """What must not be removed, and what the page says."""
    model = shelf / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    disguised = shelf / "disguised"
    disguised.mkdir()
    (disguised / "config.json").write_text('{"model_type": "llama"}')
    (disguised / "config.toml").write_text("")
    (shelf / "a-0002" / "thesis.tex").write_text("mine")
    (shelf / "link").symlink_to(shelf / "a-0004")
    (shelf / "empty").mkdir()
    return {
        "absent": (shelf / "absent", "nothing there"), "a file": (shelf / "a-0001" / "config.json", "a file"),
        "a model": (model, "without config.toml"), "a model in disguise": (disguised, "that no run wrote"),
        "with somebody's file": (shelf / "a-0002", "thesis.tex"), "a link": (shelf / "link", "a link to"),
        "an empty folder": (shelf / "empty", "without config.json"), "the folder of runs": (shelf, "without config.json"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["absent", "a file", "a model", "a model in disguise", "with somebody's file", "a link", "an empty folder", "the folder of runs"],
)
def test_what_is_no_run_is_not_removed_nor_is_any_other_beside_it(name: str, atoll: Callable[..., object], shelf: Path) -> None:
    path, says = strange(shelf)[name]
    before = sorted(map(str, shelf.rglob("*")))
    outcome = atoll("runs", "rm", "a-0001", path, "--yes")
    assert outcome.status == 2
    assert says in outcome.err
    assert sorted(map(str, shelf.rglob("*"))) == before


def test_a_run_that_goes_on_is_told_and_not_removed(atoll: Callable[..., object], shelf: Path) -> None:
    with (shelf / "a-0003" / "events.jsonl").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert [one["status"] for one in json.loads(atoll("runs", "--json").out)][2] == "running"
        outcome = atoll("runs", "rm", "a-0003", "--yes")
        assert (outcome.status, "R503" in outcome.err) == (2, True)
        assert (shelf / "a-0003").is_dir()
    assert atoll("runs", "rm", "a-0003", "--yes").status == 0


def test_every_file_of_the_page_is_known_as_a_runs_own() -> None:
    page = (ROOT / "docs" / "run-directory.md").read_text(encoding="utf-8").partition("| path |")[2].partition("\n\n")[0]
    assert {path.partition("/")[0] for path in re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE)} <= set(WRITTEN)


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_no_name_and_no_figure_is_cut_at_any_width(
    columns: int, atoll: Callable[..., object], shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "a-run-with-a-name-that-says-all-about-it-0001"
    make_run(shelf, long, method="fedpipe-without-quantization", folder="/data")  # A path is not broken, however long.
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in ((), ("show", long), ("compare", long, "a-0004")):
        outcome = atoll("runs", *arguments)
        assert long in outcome.out
        assert "fedpipe-without-quantization" in outcome.out
        assert "…" not in outcome.out
        assert all(len(line) <= columns for line in outcome.out.splitlines())


def test_ten_thousand_runs_are_listed(atoll: Callable[..., object], tmp_path: Path) -> None:
    """Every folder is read once, and none is opened for writing."""
    first = make_run(tmp_path / "runs", "a-0001")
    for number in range(2, 2001):
        path = tmp_path / "runs" / f"a-{number:04d}"
        path.mkdir()
        for name in ("config.toml", "config.json", "events.jsonl", "summary.json"):
            os.link(first / name, path / name)
    assert len(json.loads(atoll("runs", "--json").out)) == 2000
    assert len(atoll("runs", "--last", 10).out.splitlines()) == 13


def test_an_edge_that_held_more_than_it_has_is_said(atoll: Callable[..., object], tmp_path: Path) -> None:
    for name, memory in (("over", 950_000), ("within", 1_000_000)):
        edge = {**CONFIG["edge"][0], "memory": memory}  # type: ignore[index, dict-item]
        make_run(tmp_path / "runs", name, config={**CONFIG, "edge": [edge]})
    assert "north" in (said := " ".join(atoll("runs", "show", "over").out.partition("edges")[2].split()))
    assert "held 1 MB of the 950 kB that it has; memory is measured of the process" in said
    assert "that it has" not in atoll("runs", "show", "within").out
