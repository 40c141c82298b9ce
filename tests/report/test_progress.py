"""What a person sees of a run."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from atoll.report.lines import describe_event
from atoll.report.progress import Progress, Style
from atoll.runs.events import (
    CheckpointWritten,
    DataLoaded,
    EdgeDropped,
    EdgeFinished,
    Evaluated,
    Event,
    PhaseStarted,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    StepDone,
)

RUN: list[Event] = [
    RunStarted("clinics-0001", 0, 1, ("north", "south")),
    DataLoaded("train", "north", 10, 1, 2, 1000, 400),
    PhaseStarted("federated", 4),
    RoundStarted("federated", 1, 1, ("north", "south")),
    *(StepDone("federated", 1, "north", step, 2.5, 1e-3, 0.7, 100, 40, 21) for step in (1, 2)),
    EdgeFinished("federated", 1, "north", 2, 2.5, 3000, 2000, 10**9, 1.5),
    EdgeDropped(1, "south", "no answer within 1 h"),
    RoundFinished("federated", 1, ("north",), 0.0, 3000, 2000, 1.6),
    CheckpointWritten(1, "checkpoints/round-0001"),
    PhaseStarted("evaluate", 20),
    Evaluated("federated", {"loss": 1.25, "perplexity": 3.49, "num_rows": 20.0}),
    RunFinished("complete", 3.0),
]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def _shown(stream: io.StringIO, style: Style) -> str:
    with Progress(style, stream) as progress:
        for event in RUN:
            progress(event)
    return stream.getvalue()


@pytest.mark.parametrize("style", ["auto", "lines"])
def test_lines_where_there_is_no_terminal(style: Style) -> None:
    assert _shown(io.StringIO(), style).splitlines() == [
        "run clinics-0001: 2 edges (north, south), 1 round, seed 0",
        "train data of north: 10 rows, 1000 tokens, 400 with loss (1 skipped, 2 cut to max_length)",
        "federated: 4 steps",
        "federated round 1: north, 2 steps, mean loss 2.5, up 3 kB, down 2 kB, 1.5 s",
        "round 1: edge south dropped: no answer within 1 h",
        "federated round 1: 1 update, up 3 kB, down 2 kB, 1.6 s",
        "evaluate: 20 rows",
        "federated: loss 1.25, perplexity 3.49",
        "complete after 3.0 s",
    ]


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_a_terminal_has_the_lines_of_a_pipe_and_a_bar_that_is_never_cut(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _shown(Terminal(), "auto"))
    lines = re.split(r"[\r\n]+", text)
    assert all(len(line) <= columns for line in lines)
    assert "…" not in text
    whole = re.sub(r"\s+", " ", text)
    for line in _shown(io.StringIO(), "lines").splitlines():
        assert line in whole or line.startswith(("federated: 4", "evaluate")), "what a bar says has no line"
    last = [line for line in lines if line.startswith("federated ") and "2/2" in line][-1]
    for words in ("round 1/1", "1 of 2 edges", "1 dropped", "loss 2.500", "5 kB"):
        assert words in last
    assert ("answered" in last) == ("left" in last) == (columns == 140)


def test_a_bar_moves_when_edges_answer_whose_steps_nobody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    names, stream = ("north", "south", "west"), Terminal()
    events: list[Event] = [PhaseStarted("federated", 6), RoundStarted("federated", 1, 1, names)]
    events += [EdgeFinished("federated", 1, name, 2, 2.0, 1000, 1000, 10**9, 1.0) for name in names[:2]]
    with Progress("auto", stream) as progress:
        for event in events:
            progress(event)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = re.split(r"[\r\n]+", text.strip())[-1]
    assert "2 of 3 edges answered" in last
    assert "4/6" in last


def test_names_are_shown_as_they_are() -> None:
    """Neither as an emoji nor as colours."""
    stream = Terminal()
    with Progress("auto", stream) as progress:
        progress(PhaseStarted("evaluate", 2))
        progress(Evaluated("local-only:hospital:", {"loss": 1.0}))
        progress(EdgeDropped(1, "[red]x[/red]", "because"))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "local-only:hospital:: loss 1" in text
    assert "edge [red]x[/red] dropped" in text


def test_one_of_anything_is_one() -> None:
    finished = EdgeFinished("local-only", 1, "a", 1, 2.0, 0, 0, 0, 1.0)
    events = (DataLoaded("train", "", 1, 0, 0, 1, 1), PhaseStarted("federated", 1), finished)
    assert [describe_event(event) for event in events] == [
        "train data: 1 row, 1 token, 1 with loss", "federated: 1 step",
        "local-only round 1: a, 1 step, mean loss 2, up 0 B, down 0 B, 1.0 s",
    ]  # fmt: skip


def test_what_is_not_counted_has_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = _shown(Terminal(), "bars")
    assert "0/?" not in shown
    assert re.search(r"evaluate +20 rows", shown)


def test_silence() -> None:
    assert _shown(Terminal(), "silent") == ""


def test_an_interrupt_leaves_the_terminal_tidy() -> None:
    stream = Terminal()
    with contextlib.suppress(KeyboardInterrupt), Progress("auto", stream) as progress:
        progress(PhaseStarted("federated", 4))
        raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_steps_have_no_line() -> None:
    assert describe_event(RUN[4]) == ""
