"""Tables for the terminal: the comparison of a run, scores of an evaluation, a plan."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from atoll.printable import printable
from atoll.runs.summary import Scores, Summary
from atoll.units import format_seconds

_FIRST = ("loss", "perplexity")
_TITLES = {"loss": "loss (nats/token)"}


def print_table(table: Table, stream: TextIO) -> None:
    """The table with colour on a terminal, as plain text of its full width elsewhere."""
    if stream.isatty():
        Console(file=stream).print(table)
    else:
        # In the stream's own encoding, so that rich draws with what it has.
        text = io.TextIOWrapper(io.BytesIO(), encoding=stream.encoding or "utf-8", errors="backslashreplace", write_through=True)
        Console(file=text, width=200, no_color=True, highlight=False).print(table)
        text.seek(0)
        # rich fills every line with spaces to the table's width.
        print("\n".join(line.rstrip() for line in text.read().splitlines() if line.strip()), file=stream)


def comparison_table(summary: Summary) -> Table | None:
    """Base, local-only (mean and each edge), homogeneous, federated and central, best loss in bold; None for a run without evaluation."""
    rows: list[tuple[str, Scores]] = []
    evaluation = summary.eval
    if evaluation.base is not None:
        rows.append(("base", evaluation.base))
    if evaluation.local_only is not None:
        rows.append(("local-only (mean)", evaluation.local_only.mean))
        rows += [(f"  {name}", scores) for name, scores in evaluation.local_only.edges.items()]
    if evaluation.homogeneous is not None:
        one = evaluation.homogeneous
        rows.append((f"homogeneous ({_edges(len(one.edges))}{_simulated(one.simulated_seconds)})", one.scores))
    if evaluation.adapted is not None and evaluation.homogeneous is not None:
        rows.append((f"federated ({_edges(len(summary.edges))}{_simulated(summary.seconds.simulated)})", evaluation.adapted))
    elif evaluation.adapted is not None:
        rows.append(("federated" if len(summary.edges) > 1 else "adapted", evaluation.adapted))
    if evaluation.central is not None:
        rows.append(("central", evaluation.central))
    return scores_table(rows, "held-out rows of all edges") if rows else None


def _edges(number: int) -> str:
    return f"{number} edge{'' if number == 1 else 's'}"


def _simulated(seconds: float | None) -> str:
    return "" if seconds is None else f", {format_seconds(seconds)} simulated"


def scores_table(rows: Sequence[tuple[str, Scores]], title: str) -> Table:
    """One line for each named set of scores, one column for each metric; what was only counted (num_...) stays in the JSON."""
    names = [name for name in _FIRST if any(name in scores for _, scores in rows)]
    names += sorted({name for _, scores in rows for name in scores if not name.startswith("num_")} - set(_FIRST))
    titles = {"loss": "loss (nats/row)"} if "macro_f1" in names else _TITLES  # A classifier has one label for each row.
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(titles.get(name, name.replace("_", " ")), justify="right", no_wrap=True)
    losses = [loss for _, scores in rows if (loss := scores.get("loss")) is not None]
    for label, scores in rows:
        best = len(rows) > 1 and bool(losses) and scores.get("loss") == min(losses)
        table.add_row(label, *(_number(scores.get(name), name) for name in names), style="bold" if best else None)
    return table


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Mapping[str, str] | None = None) -> Table:
    """Text cells under a header; columns after the first to the right, notes below. The text may be a peer's: it is shown as it is."""
    caption = "\n".join(_plain(f"{name}: {text}") for name, text in (notes or {}).items()) or None
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=number < len(header) - 1)
    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def _plain(text: str) -> str:
    return escape(printable(text))


def _number(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    if abs(value) < 1e4 and name in ("bleu", "perplexity"):
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.4g}"
