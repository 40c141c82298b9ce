"""What stands on a screen at 80, 100 and 140 columns: every cell whole, as a table where there is place, else as cards."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.report.hosts import status_table
from atoll.report.plans import plan_table
from atoll.report.runs.listing import edges_of, list_of_runs, side_by_side
from atoll.report.tables import Listing, plain_table, print_facts, print_table, scores_table
from atoll.runs.comparison import Comparison
from atoll.runs.record import RunRecord

LONG = "university-hospital-of-the-northern-provinces-second-clinic"
EDGE = {
    "mode": "local", "bits": 16, "batch_size": 1, "accumulate": 8, "ranks": {"a": 8, "b": 16}, "num_steps": 44, "predicted_seconds": 59.4,
    "predicted_peak_bytes": 324_000_000, "up_bytes": 196_000, "down_bytes": 196_000, "binding": "memory", "objective": 0.5,
    "why": "the whole base here in 16 bits; memory binds; 1 GB more: batch 1 to 8",
}  # fmt: skip
PLAN = {
    "rounds": 3, "num_trainable": 97_792, "num_parameters": 1_445_280, "importance": "unknown", "remarks": ["a remark on the base"],
    "edges": [{**EDGE, "name": "city"}, {**EDGE, "name": LONG, "binding": "time and memory"}],
    "left_out": [{"name": "ambulance", "why": "16 bits here would need at least 3.91 MB more memory"}],
}  # fmt: skip
SESSION = {
    "session": "0123456789abcdef", "tenant": LONG, "seconds": 3600.0, "tokens": "123456", "positions": "1234567", "compute_seconds": 0.5,
    "received_bytes": "123456789", "sent_bytes": "123456789",
}  # fmt: skip
STATUS = {
    "num_blocks": 4, "bits": 32, "precision": "fp32", "sessions": 1, "max_sessions": 2, "tokens_per_second": 1.0, "resident_bytes": "1000",
    "uptime_seconds": 2.0, "open": [SESSION],
}  # fmt: skip
SCORES = dict.fromkeys(("loss", "perplexity", "bleu", "rouge1", "rouge2", "rougeL", "exact_match", "slot_accuracy"), 0.125)
RUN = RunRecord(
    f"{LONG}-0001", Path("runs") / LONG, "interrupted", method="fedpipe-without-quantization", base="organisation/a-base-of-7-billion",
    started="2026-01-02T03:04:05+00:00", loss_before=4.25, loss_after=1.5,
)  # fmt: skip
COMPARED = Comparison(
    (RUN.name, "b-0002"), {"model.base": ("organisation/a-base-of-7-billion", "tiny"), "run.seed": (0, 1)},
    {"status": ("complete", "failed"), "adapted loss": (1.5, None), "up_bytes": (123_456, 0), "simulated_seconds": (61.0, None)},
)  # fmt: skip
SUMMARY = {
    "edges": [{"name": LONG, "mode": "local", "bits": 4, "batch_size": 8, "steps": 10, "measured_peak_bytes": 10**9, "up_bytes": 10**6}],
}  # fmt: skip
SCREENS: dict[str, Callable[[], tuple[Listing, ...]]] = {
    "plan": lambda: (plan_table(PLAN),), "status": lambda: (status_table(STATUS),), "runs": lambda: (list_of_runs([RUN], "1 run in runs"),),
    "compare": lambda: side_by_side(COMPARED), "scores": lambda: (scores_table([("base", SCORES), ("  north", SCORES)], "held-out rows"),),
    "edges": lambda: tuple(filter(None, [edges_of(SUMMARY, {})])),
}  # fmt: skip


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(listing: Listing, stream: io.StringIO) -> list[str]:
    print_table(listing, stream)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.parametrize("columns", [80, 100, 140])
@pytest.mark.parametrize("name", SCREENS)
def test_nothing_is_cut_and_no_line_is_too_long(
    name: str, columns: int, stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for listing in SCREENS[name]():
        lines = screen(listing, stream())
        assert "…" not in "".join(lines)
        assert all(len(line) <= columns for line in lines)
        whole = " ".join(" ".join(lines).split())
        for row in listing.rows:
            for cell in row:
                assert cell.strip() in whole
        for label, note in listing.notes:
            assert f"{label.strip()}" in whole
            assert note in whole


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_the_limit_stands_beside_the_name_where_a_row_has_no_line_of_its_own(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = screen(plan_table(PLAN), Terminal())
    assert f"{LONG}   limit time and memory" in lines or (f"{LONG}" in lines and "  limit time and memory" in lines)
    assert "city   limit memory" in lines


def test_there_is_a_table_where_there_is_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (header,) = [line for line in screen(plan_table(PLAN), Terminal()) if "steps/round" in line]
    assert header.split()[-1] == "limit"
    monkeypatch.delenv("COLUMNS")
    assert header in screen(plan_table(PLAN), io.StringIO()), "in a pipe there always is"


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream, coloured in ((Terminal(), True), (io.StringIO(), False)):
        print_table(plan_table(PLAN), stream)
        assert ("\x1b[" in stream.getvalue()) == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    print_table(plan_table(PLAN), stream)
    assert "\x1b[" not in stream.getvalue()


@pytest.mark.parametrize("columns", [80, 200])
def test_names_are_text_and_neither_colours_nor_emojis_nor_lines(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    evil = "[red]x[/red] :hospital: \x1b[2J\nnorth"
    listing = plain_table(evil, ("a", evil), [(evil, evil)], {evil: evil}, evil)
    text = "\n".join(screen(listing, Terminal()))
    assert text.count("[red]x[/red] :hospital: \\x1b[2J\\nnorth") >= 5
    stream = io.StringIO()
    print_facts(evil, [(evil, evil)], stream)
    assert "\x1b" not in stream.getvalue()


def test_facts_are_broken_between_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    print_facts("run", [("command", "atoll train run.toml " + "--set run.seed=1 " * 10), ("base", "tiny")], stream)
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert stream.getvalue().count("run.seed=1") == 10
    assert lines[-1] == "  base     tiny"
