"""Tables for the terminal: the comparison of a run, scores of an evaluation, a plan. What a line has no place for becomes a card."""

from __future__ import annotations

import io
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atoll.printable import printable
from atoll.runs.summary import Scores, Summary
from atoll.units import counted, format_seconds

_FIRST = ("loss", "perplexity")
_PERSONAL = ("base", "local_only", "federated", "personal", "central")
TITLES = {"loss": "loss (nats/token)"}
"""Of columns, where a metric has another than its name."""
_ANY_WIDTH = 100_000
_NOTHING = ("", "-")
_TOGETHER = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True)
class Listing:
    """Rows of text under a header, as they are shown at any width. The text may be a peer's or a file's: it is shown as it is."""

    title: str
    header: tuple[str, ...]
    """The first column names the row."""
    rows: Sequence[Sequence[str]]
    notes: Sequence[tuple[str, str]] = ()
    """What is said below, each with its label; a label may stand above more than one."""
    lead: str | None = None
    """The column that is told first of a row that has no line of its own."""
    best: frozenset[int] = frozenset()
    """Rows that stand out."""


def print_table(listing: Listing, stream: TextIO) -> None:
    """As a table where it has the place, else a card for each row: no cell is ever cut. In colour on a terminal, plain elsewhere.

    Elsewhere than on a terminal there is place for every line, unless COLUMNS says how much.
    """
    width = width_of(stream)
    # In the stream's own encoding, so that rich draws with what it has.
    buffer = io.BytesIO()
    text = io.TextIOWrapper(buffer, encoding=stream.encoding or "utf-8", errors="backslashreplace", write_through=True)
    colour = stream.isatty() and not os.environ.get("NO_COLOR")
    console = Console(
        file=text, width=_ANY_WIDTH, no_color=not colour, force_terminal=colour, highlight=False, markup=False, emoji=False
    )  # fmt: skip
    table = _table(listing)
    for title in wrapped(printable(listing.title), width):
        console.print(Text(title, style="italic"))
    if listing.rows and console.measure(table).maximum <= width:
        console.print(table)
    else:
        for row in range(len(listing.rows)):
            for line in _card(listing, row, width):
                console.print(line)
    for label, note in listing.notes:
        for below in wrapped(f"{printable(label)}: {printable(note)}", width, below="    "):
            console.print(Text(below, style="dim"))
    # rich fills every line with spaces to the table's width.
    shown = buffer.getvalue().decode(stream.encoding or "utf-8", errors="backslashreplace").splitlines()
    print("\n".join(line.rstrip() for line in shown if line.strip()), file=stream)


def print_facts(title: str, facts: Sequence[tuple[str, str]], stream: TextIO) -> None:
    """Facts below each other, each behind its label and broken between words alone."""
    width = width_of(stream)
    widest = max((cell_len(printable(label)) for label, _ in facts), default=0)
    print(printable(title), file=stream)
    for label, text in facts:
        head = f"  {printable(label):<{widest}}  "
        lines = wrapped(printable(text), width - len(head)) or [""]
        print("\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])]), file=stream)


def width_of(stream: TextIO) -> int:
    """Columns of a terminal, or of COLUMNS; elsewhere there is place for every line."""
    return shutil.get_terminal_size().columns if stream.isatty() or os.environ.get("COLUMNS") else _ANY_WIDTH


def wrapped(text: str, width: int, below: str = "") -> list[str]:
    """The text on lines of this width, broken between words alone; `below` stands at the head of all but the first."""
    return textwrap.wrap(text, max(width, 20), subsequent_indent=below, break_long_words=False, break_on_hyphens=False)


def _table(listing: Listing) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(listing.header):
        table.add_column(Text(printable(name)), justify="right" if number else "left", no_wrap=True)
    for number, row in enumerate(listing.rows):
        table.add_row(*(Text(printable(cell)) for cell in row), style="bold" if number in listing.best else None)
    return table


def _card(listing: Listing, number: int, width: int) -> list[Text]:
    """A row on lines of its own: its name and what is told first, then each cell behind its column's name, as many as a line holds."""
    row = listing.rows[number]
    cells = zip(listing.header[1:], row[1:], strict=True)
    pairs = {name: f"{printable(name)} {printable(cell)}" for name, cell in cells if cell not in _NOTHING}
    name, first = Text(printable(row[0]).strip(), style="bold"), pairs.pop(listing.lead or "", None)
    parts = [] if first is None else [first]
    if parts and cell_len(f"{name.plain}   {first}") <= width:
        name.append(f"   {parts.pop()}", style="not bold")
    # A pair is broken only where a line does not hold it.
    parts.append("   ".join(pair.replace(" ", _TOGETHER) if cell_len(pair) <= width - 2 else pair for pair in pairs.values()))
    below = [line for part in parts for line in wrapped(part, width - 2, below="  ")]
    return [name, *(Text("  " + line.replace(_TOGETHER, " ")) for line in below)]


def comparison_table(summary: Summary) -> Listing | None:
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


def personal_table(summary: Summary) -> Listing | None:
    """Every edge's loss on its own held-out rows by each adapter there is; None where there are no personal copies that were scored."""
    found = {edge: scores for edge, scores in (summary.eval.personal or {}).items() if scores}
    if not found:
        return None
    names = [row for row in _PERSONAL if any(row in scores for scores in found.values())]
    rows = [(edge, *(number_text(scores.get(name, {}).get("loss"), "loss") for name in names)) for edge, scores in found.items()]
    return Listing("each edge's own held-out rows: loss (nats/token)", ("", *(name.replace("_", "-") for name in names)), rows)


def _edges(number: int) -> str:
    return counted(number, "edge")


def _simulated(seconds: float | None) -> str:
    return "" if seconds is None else f", {format_seconds(seconds)} simulated"


def scores_table(rows: Sequence[tuple[str, Scores]], title: str) -> Listing:
    """One line for each named set of scores, one column for each metric; what was only counted (num_...) stays in the JSON."""
    names = [name for name in _FIRST if any(name in scores for _, scores in rows)]
    names += sorted({name for _, scores in rows for name in scores if not name.startswith("num_")} - set(_FIRST))
    titles = {"loss": "loss (nats/row)"} if "macro_f1" in names else TITLES  # A classifier has one label for each row.
    losses = [loss for _, scores in rows if (loss := scores.get("loss")) is not None]
    best = {number for number, (_, scores) in enumerate(rows) if len(rows) > 1 and losses and scores.get("loss") == min(losses)}
    cells = [(label, *(number_text(scores.get(name), name) for name in names)) for label, scores in rows]
    return Listing(title, ("", *(titles.get(name, name.replace("_", " ")) for name in names)), cells, best=frozenset(best))


def plain_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Mapping[str, str] | None = None, lead: str | None = None
) -> Listing:  # fmt: skip
    """Text cells under a header, notes below, each with its label."""
    return Listing(title, tuple(header), rows, tuple((notes or {}).items()), lead)


def number_text(value: float | None, name: str) -> str:
    """A score for people."""
    if value is None:
        return "-"
    if abs(value) < 1e4 and name in ("bleu", "perplexity"):
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.4g}"
