"""How a run's losses went: every number of its event log as metrics.csv, and the losses as a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.runs.events import read_events
from atoll.runs.files import write_bytes, write_text
from atoll.runs.layout import RunDirectory
from atoll.runs.record import number_in, table
from atoll.units import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = (
    "time", "event", "phase", "round", "edge", "step", "row", "loss", "learning_rate", "grad_norm", "num_tokens", "num_label_tokens",
    "num_active", "num_steps", "mean_loss", "up_bytes", "down_bytes", "peak_bytes", "seconds", "simulated_seconds", "discarded_share",
)  # fmt: skip
_TOLD = ("step_done", "edge_finished", "round_finished", "evaluated")
_FEDERATED = "federated"
_MOST_NAMED, _MOST_POINTS, _DOTTED = 8, 2000, 30
_STYLE: Mapping[str, object] = {"font.size": 9.0, "axes.titlesize": 10.0, "savefig.dpi": 130}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F")  # no pair needs a sense of colour


def write_losses(run: RunDirectory) -> tuple[Path, ...]:
    """Write metrics.csv, a line for each step, answer of an edge, round and scoring, and report/loss.png; what a run did twice, as it was
    stopped in between, is there as it was done last.

    Raises: RunFolderError for an event log that is missing or damaged.
    """
    lines = _lines(run)
    scores = {name for line in lines for name in table(line.get("metrics"))}
    columns = (*_COLUMNS, *sorted(scores - set(_COLUMNS)))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({**line, **table(line.get("metrics"))})
    write_text(run.path / "metrics.csv", text.getvalue())
    image = _figure(lines)
    if image is None:
        return ()
    folder = run.path / "report"
    folder.mkdir(exist_ok=True)
    write_bytes(folder / "loss.png", image)
    return (folder / "loss.png",)


def _lines(run: RunDirectory) -> list[dict[str, Any]]:
    """The events with numbers; those that were done again later are left out."""
    kept: list[dict[str, Any]] = []
    for event in read_events(run.events_path):
        if event.get("event") == "resumed":
            kept = [line for line in kept if _stands(line, number_in(event, "round") or 0)]
        elif event.get("event") in _TOLD:
            kept.append({str(key): value for key, value in event.items()})
    return kept


def _stands(line: Mapping[str, Any], last_round: float) -> bool:
    """Whether a line is of what is not done again after so many rounds."""
    if line["event"] != "evaluated":
        return line.get("phase") in (_FEDERATED, "warm-up") and (number_in(line, "round") or 0) <= last_round
    row = str(line.get("row"))
    return row == "base" or (row.startswith("round-") and row[6:].isdigit() and int(row[6:]) <= last_round)


def _figure(lines: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of training losses by edge, and of held-out losses by round; None where there is nothing to draw."""
    trained, held_out = _trained(lines), list(_held_out(lines))
    if not trained and not held_out:
        return None
    from matplotlib.figure import Figure
    from matplotlib.style import context
    from matplotlib.ticker import MaxNLocator

    panels = [draw for draw, has in ((_draw_trained, trained), (_draw_held_out, held_out)) if has]
    # A person's own matplotlibrc must not change the bytes.
    with context(["default", dict(_STYLE)]):
        figure = Figure(figsize=(5.5 * len(panels), 3.6))
        found = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, draw in zip(found, panels, strict=True):
            draw(axes, lines)
            axes.set_ylabel("loss")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3, linewidth=0.5)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.subplots_adjust(left=0.6 / (5.5 * len(panels)), right=0.98, bottom=0.15, top=0.9, wspace=0.2)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _trained(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Training loss by edge: at each step, or in the mean of each round where steps are not seen."""
    found: dict[str, list[tuple[float, float]]] = {}
    kind, at, loss = ("step_done", "step", "loss") if _has_steps(lines) else ("edge_finished", "round", "mean_loss")
    for line in lines:
        x, y = number_in(line, at), number_in(line, loss)
        if line["event"] == kind and line.get("phase") == _FEDERATED and x is not None and y is not None:
            found.setdefault(str(line.get("edge")), []).append((x, y))
    return found


def _has_steps(lines: Sequence[Mapping[str, Any]]) -> bool:
    return any(line["event"] == "step_done" and line.get("phase") == _FEDERATED for line in lines)


def _held_out(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """Row, round and loss of every scoring; the base comes before the first round, what is scored at the end after the last one."""
    last = max((number_in(line, "round") or 0 for line in lines if line.get("phase") == _FEDERATED), default=0)
    for line in lines:
        loss = number_in(line.get("metrics"), "loss")
        if line["event"] == "evaluated" and loss is not None:
            row = str(line.get("row"))
            on_the_way = row.removeprefix("round-")
            yield (_FEDERATED, float(on_the_way), loss) if on_the_way.isdigit() else (row, 0.0 if row == "base" else last, loss)


def _draw_trained(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    losses = _trained(lines)
    few = len(losses) <= _MOST_NAMED
    for number, (edge, points) in enumerate(losses.items()):
        every = -(-len(points) // _MOST_POINTS)
        x, y = zip(*points[::every], strict=True)
        colour = _COLOURS[number] if few else "#7F7F7F"
        shown = {"label": edge, "alpha": 0.9} if few else {"alpha": 0.3}
        axes.plot(x, y, linewidth=1.0, color=colour, marker="." if len(x) < _DOTTED else "", **shown)
    axes.set_title("training, by edge" if few else f"training, {counted(len(losses), 'edge')}", loc="left")
    axes.set_xlabel("step" if _has_steps(lines) else "round")
    if few:
        axes.legend(frameon=False, fontsize=8)


def _draw_held_out(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    points = list(_held_out(lines))
    base = [(x, y) for row, x, y in points if row == "base"]
    line = sorted([*base, *((x, y) for row, x, y in points if row == _FEDERATED)])
    if line:
        axes.plot(*zip(*line, strict=True), color=_COLOURS[0], marker="o", markersize=4, label=_FEDERATED)
    others = [(row, y) for row, _, y in points if row not in ("base", _FEDERATED)]
    alone = [y for row, y in others if row.startswith("local-only:")]
    named = [("local-only, mean", sum(alone) / len(alone))] if alone else []
    named += [(row, y) for row, y in others if not row.startswith("local-only:")]
    for number, (row, y) in enumerate(named, start=1):
        axes.axhline(y, color=_COLOURS[number % len(_COLOURS)], linestyle="--", linewidth=1.0, label=row)
    axes.set_title("held-out rows", loc="left")
    axes.set_xlabel("round")
    axes.legend(frameon=False, fontsize=8)
