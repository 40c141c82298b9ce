"""Tables for the terminal."""

from __future__ import annotations

import io

import pytest

from atoll.report.hosts import status_table
from atoll.report.plans import plan_table
from atoll.report.tables import comparison_table, print_table, scores_table
from atoll.runs.summary import EdgeSummary, Evaluation, LocalOnly, Summary

EDGES = tuple(EdgeSummary(name, "local", 32, 8, {}, 10, None, None, 1.0, 0, 0, 0) for name in ("north", "south"))
FULL = Evaluation(
    base={"loss": 4.3, "perplexity": 73.7, "slot_accuracy": 0.0},
    adapted={"loss": 1.1, "perplexity": 3.0, "slot_accuracy": 0.75},
    local_only=LocalOnly(
        {"loss": 1.5, "perplexity": 4.5}, {"north": {"loss": 1.4, "perplexity": 4.1}, "south": {"loss": 1.6, "perplexity": 5.0}}
    ),
    central={"loss": 1.0, "perplexity": None},
)  # fmt: skip


def _text(table: object) -> list[str]:
    stream = io.StringIO()
    print_table(table, stream)
    return [" ".join(line.split()) for line in stream.getvalue().splitlines() if line.strip()]


def test_the_comparison_has_its_rows_in_order() -> None:
    table = comparison_table(Summary("complete", FULL, edges=EDGES))
    lines = _text(table)
    assert lines[1] == "loss (nats/token) perplexity slot accuracy"
    assert lines[3:] == [
        "base 4.300 73.70 0.000",
        "local-only (mean) 1.500 4.50 -",
        "north 1.400 4.10 -",
        "south 1.600 5.00 -",
        "federated 1.100 3.00 0.750",
        "central 1.000 - -",
    ]


def test_what_a_host_says_of_itself_is_shown_and_not_obeyed() -> None:
    """Neither by the terminal nor by the library that draws the table."""
    evil = "[red]x[/red]\x1b[2J\nnorth"
    session = {"session": evil, "tenant": evil, "seconds": 1.0, "tokens": "3", "positions": "4", "compute_seconds": 0.5,
               "received_bytes": "1", "sent_bytes": "2"}  # fmt: skip
    status = {"num_blocks": 4, "bits": 32, "precision": evil, "sessions": 1, "max_sessions": 2, "tokens_per_second": 1.0,
              "resident_bytes": "1000", "uptime_seconds": 2.0, "open": [session]}  # fmt: skip
    lines = _text(status_table(status))
    assert all(line.isprintable() for line in lines)
    assert sum(line.count("[red]x[/red]\\x1b[2J\\nnorth") for line in lines) == 3


def test_a_tenant_sees_what_it_has_used_of_what_it_may() -> None:
    none = {"tenant": "south", "sessions": 1, "max_sessions": 0, "max_tokens_per_second": 0.0, "burst_tokens": 0.0, "tokens_left": 0.0,
            "held_seconds": 0.0, "max_bytes": "0", "period_seconds": 0.0, "bytes": "0", "free_seconds": 0.0}  # fmt: skip
    all_of_them = {"tenant": "north", "sessions": 1, "max_sessions": 2, "max_tokens_per_second": 300.0, "burst_tokens": 400.0,
                   "tokens_left": -20.0, "held_seconds": 12.3, "max_bytes": "1000000", "period_seconds": 3600.0, "bytes": "20300000",
                   "free_seconds": 7800.0}  # fmt: skip
    status = {"num_blocks": 4, "bits": 32, "precision": "fp32", "sessions": 1, "max_sessions": 2, "tokens_per_second": 1.0,
              "resident_bytes": "1000", "uptime_seconds": 2.0, "open": [], "tenants": [none, all_of_them]}  # fmt: skip
    text = " ".join(_text(status_table(status)))
    assert "limits of south" not in text
    assert (
        "limits of north: 1 of 2 sessions; -20 of 400 tokens at once, then 300/s; held back for 12.3 s; "
        "20.3 MB used of 1 MB in 1 h 00 min; all free again in 2 h 10 min"
    ) in text


def test_plain_text_has_no_colour_and_no_cut_cells() -> None:
    stream = io.StringIO()
    table = comparison_table(Summary("complete", FULL, edges=EDGES))
    assert table is not None
    print_table(table, stream)
    assert "\x1b" not in stream.getvalue()
    assert "…" not in stream.getvalue()


def test_a_run_without_held_out_rows_has_no_comparison() -> None:
    assert comparison_table(Summary("complete")) is None


def test_one_edge_is_not_called_federated() -> None:
    table = comparison_table(Summary("complete", Evaluation({"loss": 2.0}, {"loss": 1.0}), edges=EDGES[:1]))
    assert [line.split()[0] for line in _text(table)[3:]] == ["base", "adapted"]


def test_metrics_follow_loss_and_perplexity() -> None:
    lines = _text(scores_table([("model", {"bleu": 31.234, "num_rows": 40.0, "loss": 1.0, "perplexity": 2.7, "exact_match": 0.5})], "x"))
    assert lines[1] == "loss (nats/token) perplexity bleu exact match"
    assert lines[3] == "model 1.000 2.70 31.23 0.500"


def test_a_plan_has_a_line_for_each_edge_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    edge = {
        "name": "north", "mode": "local", "bits": 32, "batch_size": 8, "accumulate": 2, "ranks": {"a": 8, "b": 4}, "num_steps": 50,
        "gradient_checkpointing": False, "predicted_peak_bytes": 2_000_000_000, "predicted_seconds": None, "up_bytes": 1000,
        "down_bytes": 1000, "binding": "memory", "why": "because", "objective": None,
    }  # fmt: skip
    plan = {
        "rounds": 3, "num_parameters": 1000, "num_trainable": 10, "predicted_seconds": None, "importance": None, "edges": [edge],
        "left_out": [{"name": "south", "why": "too small"}],
    }  # fmt: skip
    lines = _text(plan_table(plan))
    assert lines[0] == "3 rounds; 10 of 1,000 parameters trained (1 %)"
    assert "north local 32 4 to 8 2 8 x 2 50 2 GB - 1 kB 1 kB memory" in lines
    assert "south left out - - - - - - - - - -" in lines
    assert lines[-2:] == ["north: because", "south: too small"]
    lines = _text(plan_table(plan | {"importance": "svd-sensitivity", "edges": [edge | {"objective": 0.25}]}))
    assert "worth of ranks by svd-sensitivity" in lines[0]
    assert "north local 32 4 to 8 2 25.0% 8 x 2 50 2 GB - 1 kB 1 kB memory" in lines
