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
    RoundStarted("federated", 1, 1),
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
        "federated round 1: north, 2 steps, mean loss 2.5, 1.5 s",
        "round 1: edge south dropped: no answer within 1 h",
        "federated round 1: 1 update, up 3 kB, down 2 kB, 1.6 s",
        "evaluate: 20 rows",
        "federated: loss 1.25, perplexity 3.49",
        "complete after 3.0 s",
    ]


def test_a_bar_on_a_terminal_has_round_loss_and_bytes() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _shown(Terminal(), "auto"))
    for words in ("federated", "round 1/1", "loss 2.500", "5 kB", "2/2", "left", "complete after 3.0 s", "loss 1.25"):
        assert words in text


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
