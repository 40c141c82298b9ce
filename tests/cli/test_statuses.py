"""How a command ends: exit status, what is on standard output, and what is on standard error."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.cli.boundary import Boundary
from atoll.cli.pages import format_error
from atoll.errors import BadValueError, EdgesLostError, InfeasibleError, ManyErrors
from atoll.runs.checkpoints import write_checkpoint
from atoll.runs.layout import RunDirectory
from atoll.runs.summary import Evaluation, Summary

from tests.cli.conftest import Outcome


@pytest.fixture
def fake_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[], None]], None]:
    """Put something else in the place of training: `act` runs, then a finished run is returned."""
    (tmp_path / "run.toml").write_text("")

    def install(act: Callable[[], None]) -> None:
        def train(
            config: Path, *, out: Path | None, overrides: tuple[str, ...], observers: tuple[object, ...], host: object, trust: bool
        ) -> types.SimpleNamespace:
            act()
            summary = Summary("complete", Evaluation({"loss": 4.0}, {"loss": float("nan")}))
            figures = (Path("runs/run-0001/report/cost.svg"),)
            adapter = Path("runs/run-0001/adapter")
            return types.SimpleNamespace(run_dir=Path("runs/run-0001"), adapter=adapter, summary=summary, figures=figures)

        module = types.ModuleType("atoll.commands.train")
        module.train = train  # type: ignore[attr-defined]
        module.example_prompt = lambda run_dir: "it's a test ->"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "atoll.commands.train", module)

    return install


def _raise(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def _marked(error: BaseException, folder: Path) -> BaseException:
    RunDirectory(folder).mark(error)
    return error


def test_a_finished_run_shows_the_comparison_the_adapter_and_what_to_try(
    atoll: Callable[..., object], fake_train: Callable[..., None]
) -> None:
    fake_train(lambda: None)
    outcome = atoll("train", "run.toml")
    assert outcome.status == 0
    assert "base" in outcome.out
    assert outcome.out.splitlines()[-3:] == [
        "adapter: runs/run-0001/adapter",
        "figures: runs/run-0001/report",
        """next:    atoll generate runs/run-0001 'it'"'"'s a test ->'""",
    ]


def test_with_json_there_is_one_document_and_nothing_else(atoll: Callable[..., object], fake_train: Callable[..., None]) -> None:
    fake_train(lambda: print("a library that talks"))
    outcome = atoll("train", "run.toml", "--json")
    value = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(name))
    assert (value["status"], value["run_dir"], value["eval"]["adapted"]) == ("complete", "runs/run-0001", {"loss": None})
    assert "a library that talks" in outcome.err


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_an_infeasible_plan_is_3(flags: tuple[str, ...], atoll: Callable[..., object], fake_train: Callable[..., None]) -> None:
    fake_train(_raise(InfeasibleError("edge north cannot hold it", got="1 GB", do="declare more")))
    outcome = atoll("train", "run.toml", *flags)
    assert outcome.status == 3
    assert outcome.err.startswith("error P601: edge north cannot hold it\n")
    if not flags:
        assert outcome.out == ""
        return
    parts = {"code": "P601", "what": "edge north cannot hold it", "where": None, "got": "1 GB", "expected": None, "do": "declare more"}
    assert json.loads(outcome.out) == {**parts, "status": 3, "run_dir": None, "checkpoint": None, "resume": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint, and a space in its name."""
    folder = tmp_path / "my run"
    write_checkpoint(RunDirectory(folder), 2, lambda stage: None)
    return folder


def test_a_lost_peer_is_4_and_says_where_the_work_is(atoll: Callable[..., object], fake_train: Callable[..., None], saved: Path) -> None:
    fake_train(_raise(_marked(EdgesLostError("2 of 3 edges were lost", do="start them again"), saved)))
    outcome = atoll("train", "run.toml", "--host", "localhost:7431")
    assert (outcome.status, outcome.out) == (4, "")
    resume = f"atoll resume '{saved}' --host localhost:7431"
    assert outcome.err.endswith(f"work saved in {saved}, up to round-0002; go on with\n  {resume}\n")


def test_an_interrupt_is_130_and_says_where_the_work_is(
    atoll: Callable[..., object], fake_train: Callable[..., None], saved: Path, tmp_path: Path
) -> None:
    fake_train(_raise(_marked(KeyboardInterrupt(), saved)))
    outcome = atoll("train", "run.toml", "--json")
    assert outcome.status == 130
    assert outcome.err == f"interrupted; work saved in {saved}, up to round-0002; go on with\n  atoll resume '{saved}'\n"
    value = json.loads(outcome.out)
    assert (value["what"], value["code"], value["status"], value["run_dir"]) == ("interrupted", None, 130, str(saved))
    assert (value["checkpoint"], value["resume"]) == (f"{saved}/checkpoints/round-0002", f"atoll resume '{saved}'")
    fake_train(_raise(KeyboardInterrupt()))
    assert atoll("train", "run.toml").err == "interrupted; nothing was saved\n"


def test_a_run_without_a_checkpoint_has_saved_nothing(
    atoll: Callable[..., object], fake_train: Callable[..., None], tmp_path: Path
) -> None:
    fake_train(_raise(_marked(KeyboardInterrupt(), tmp_path / "a")))
    said = f"interrupted; no round of {tmp_path}/a was saved yet; begin again with\n  atoll resume {tmp_path}/a\n"
    assert atoll("train", "run.toml").err == said


def test_a_damaged_checkpoint_is_none(atoll: Callable[..., object], fake_train: Callable[..., None], saved: Path) -> None:
    (saved / "checkpoints/round-0002/stray").write_text("")
    fake_train(_raise(_marked(KeyboardInterrupt(), saved)))
    assert "no round of" in atoll("train", "run.toml").err


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_shows_what_names_the_result_alone(flag: str, atoll: Callable[..., object], fake_train: Callable[..., None]) -> None:
    fake_train(lambda: None)
    assert atoll("train", "run.toml", flag) == Outcome(0, "adapter: runs/run-0001/adapter\n", "")
    assert atoll(flag, "train", "run.toml").out == "adapter: runs/run-0001/adapter\n"
    assert "next:" in atoll("train", "run.toml").out


def test_verbose_shows_the_traceback_and_what_libraries_log(atoll: Callable[..., object], fake_train: Callable[..., None]) -> None:
    def act() -> None:
        logging.getLogger("a.library").info("it opens")
        raise InfeasibleError("edge north cannot hold it")

    fake_train(act)
    outcome = atoll("train", "run.toml", "-v")
    assert outcome.status == 3
    assert " s  a.library: it opens\n" in outcome.err
    assert "Traceback (most recent call last)" in outcome.err
    assert outcome.err.endswith("error P601: edge north cannot hold it\n")
    assert atoll("train", "run.toml").err == "error P601: edge north cannot hold it\n"
    assert "exclude each other" in atoll("train", "run.toml", "-q", "-v").err


@pytest.mark.parametrize(("line", "code", "status"), [
    ("train", "C107", 2), ("train --jsn --json", "C107", 2), ("frobnicate --json", "C107", 2), ("status big:7431 --json", "C108", 2),
    ("evaluate --json", "C107", 2), ("runs show nowhere --json", "R501", 2), ("fleet init --json", "C107", 2),
])  # fmt: skip
def test_with_json_every_error_is_one_object(line: str, code: str, status: int, atoll: Callable[..., object]) -> None:
    outcome = atoll(*line.split())
    assert outcome.status == status
    assert outcome.err.startswith(f"error {code}: ")
    if "--json" in line:
        value = json.loads(outcome.out)
        assert (value["code"], value["status"]) == (code, status)
        assert set(value) >= {"what", "where", "got", "expected", "do"}
    else:
        assert outcome.out == ""


def test_several_errors_are_one_object_with_each_of_them(atoll: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\nrounds = 0\nseed = -1\n")
    value = json.loads(atoll("plan", "run.toml", "--json").out)
    assert (value["code"], value["what"], value["status"]) == (None, "2 errors", 2)
    assert [one["code"] for one in value["errors"]] == ["C103", "C103"]


def test_what_follows_two_dashes_is_no_option(atoll: Callable[..., object]) -> None:
    outcome = atoll("generate", "nowhere", "--", "--json")
    assert (outcome.status, outcome.out) == (2, "")


def test_a_mistake_of_our_own_is_a_short_page_and_a_file(
    atoll: Callable[..., object], fake_train: Callable[..., None], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run-0001"
    run.mkdir(parents=True)
    fake_train(_raise(_marked(ZeroDivisionError("division by zero"), run)))
    outcome = atoll("train", "run.toml")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("error X999: ")
    assert "ZeroDivisionError: division by zero" in outcome.err
    assert "Traceback" not in outcome.err
    assert str(run / "traceback.txt") in outcome.err
    assert "Traceback" in (run / "traceback.txt").read_text()


def test_without_a_run_directory_the_traceback_goes_to_a_temporary_file(
    atoll: Callable[..., object], fake_train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    fake_train(_raise(RuntimeError()))
    outcome = atoll("train", "run.toml")
    assert outcome.status == 1
    (kept,) = temporary.iterdir()
    assert str(kept) in outcome.err


def test_system_exit_keeps_its_status() -> None:
    with Boundary() as boundary:
        sys.exit(5)
    assert boundary.status == 5


def test_colour_changes_nothing_but_colour() -> None:
    error = ManyErrors([BadValueError("a", where="run.toml", got="1", do="b"), BadValueError("c", expected="2")])
    plain, coloured = format_error(error), format_error(error, colour=True)
    assert "\x1b" not in plain
    for code in ("\033[1;31m", "\033[2m", "\033[0m"):
        assert code in coloured
        coloured = coloured.replace(code, "")
    assert coloured == plain
    first = ["error C103: a", "  where     run.toml", "  got       1", "  do        b", ""]
    assert plain.splitlines() == [*first, "error C103: c", "  expected  2", "", "2 errors; nothing was written"]
