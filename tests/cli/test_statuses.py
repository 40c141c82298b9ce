"""How a command ends: exit status, what is on standard output, and what is on standard error."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.cli.boundary import Boundary
from atoll.cli.pages import format_error
from atoll.errors import BadValueError, EdgesLostError, InfeasibleError, ManyErrors
from atoll.runs.layout import RunDirectory
from atoll.runs.summary import Evaluation, Summary


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
    assert (outcome.status, outcome.out) == (3, "")
    assert outcome.err.startswith("error P601: edge north cannot hold it\n")


def test_a_lost_peer_is_4_and_says_where_the_work_is(atoll: Callable[..., object], fake_train: Callable[..., None], tmp_path: Path) -> None:
    fake_train(_raise(_marked(EdgesLostError("2 of 3 edges were lost", do="start them again"), tmp_path)))
    outcome = atoll("train", "run.toml")
    assert (outcome.status, outcome.out) == (4, "")
    assert outcome.err.endswith(f"work saved in {tmp_path}\n")


def test_an_interrupt_is_130_and_says_where_the_work_is(
    atoll: Callable[..., object], fake_train: Callable[..., None], tmp_path: Path
) -> None:
    fake_train(_raise(_marked(KeyboardInterrupt(), tmp_path)))
    outcome = atoll("train", "run.toml")
    assert (outcome.status, outcome.out, outcome.err) == (130, "", f"interrupted; work saved in {tmp_path}\n")
    fake_train(_raise(KeyboardInterrupt()))
    assert atoll("train", "run.toml").err == "interrupted; nothing was saved\n"


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
