"""Figures of a run: how much each weight matters; and where modules were chosen, who was trained when, how much each moved, and what it
cost against the full pool.

Drawn from the run directory alone, without a display; equal run directories give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.registry.parts import names
from atoll.report.activity import Choice, EdgeActivity, block_of, read_activities, short_labels
from atoll.report.costs import draw_costs
from atoll.report.importance_map import draw_importance, read_importance_table
from atoll.runs.layout import RunDirectory
from atoll.runs.summary import read_summary
from atoll.units import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_CHOSEN, _WINDOW, _KILLED = "#0072B2", "#6BB9EC", "#DEDEDE"  # far apart in lightness too: no pair needs a sense of colour
_POINTS = 72
_ROW_INCHES, _MOST_INCHES, _LEAST_INCHES = 0.19, 7.0, 1.4
_LABEL_POINTS = 8.0
_MOST_PARTED_ROWS = 120
_LOG_FROM = 30.0
"""From this ratio of largest to least score on, the scale is logarithmic: windows move less and less under a falling learning rate."""
_STYLE: Mapping[str, object] = {
    "font.size": 9.0, "axes.titlesize": 10.0, "axes.formatter.limits": (-2, 4), "svg.fonttype": "none", "svg.hashsalt": "atoll",
    "savefig.dpi": 130,
}  # fmt: skip
_SCORES = {
    "magnitude": "root mean square of the adapter's parameters",
    "snip": "mean of |parameter · gradient| in the window",
    "gradient": "mean gradient norm in the window / √(number of parameters)",
    "change": "variation in the window: norm of the parameters' change / √(number of parameters)",
    "norm-change": "variation in the window: change of the parameters' norm / √(number of parameters)",
    "product-change": "variation in the window: norm of the change of scaling · B A / √(d_in · d_out)",
}


def write_figures(run: RunDirectory) -> tuple[Path, ...]:
    """Write a run's figures into report/, each as .svg and .png: importance where it was found, modules-EDGE and cost where modules were
    chosen.

    Raises: RunFolderError for an event log, config.json or summary.json that is missing or damaged; nothing is written then.
    """
    summary = read_summary(run.summary_path)
    activities = read_activities(run.events_path, {edge.name: tuple(edge.ranks) for edge in summary.edges})
    importance = read_importance_table(run.events_path)
    if not activities and importance is None:
        return ()
    select = _section(_section(run.read_config(), "config"), "select")
    from matplotlib.style import context

    # A person's own matplotlibrc must not change the bytes; what was set before holds again after the block.
    with context(["default", dict(_STYLE)]):
        figures = {f"modules-{own.edge}": _modules_figure(own, str(select.get("variation"))) for own in activities}
        if activities:
            figures["cost"] = draw_costs(summary, activities[0].policy)
        if importance is not None:
            figures["importance"] = draw_importance(importance)
        folder = run.path / "report"
        folder.mkdir(exist_ok=True)
        return tuple(path for name, figure in figures.items() for path in _save(figure, folder, name))


def _modules_figure(own: EdgeActivity, variation: str) -> Figure:
    from matplotlib.figure import Figure

    observed = [choice for choice in own.choices if choice.scores]
    rows_inches = min(max(_ROW_INCHES * len(own.modules), _LEAST_INCHES), _MOST_INCHES)
    num_panels = 2 if observed else 1
    figure = Figure(figsize=(10.0, 0.9 + num_panels * (rows_inches + 0.9)), layout="constrained")
    panels = figure.subplots(num_panels, 1, squeeze=False)[:, 0]
    _draw_activity(panels[0], own)
    if len(observed) == 1:
        _draw_bars(panels[1], own, observed[0])
    elif observed:
        image = _draw_scores(panels[1], own, observed)
        figure.colorbar(image, ax=panels[1], pad=0.01, aspect=40)
    if observed:
        measured = _SCORES.get(own.policy, _SCORES.get(variation, "variation in the window"))
        # What somebody else's policy looks at is its own to say.
        panels[1].set_title(measured if own.policy in names("policy") else f"scores that {own.policy} chose by", loc="left")
    for panel in panels:
        _module_axis(panel, own.modules, rows_inches)
    _legend(figure, kept=len(observed) > 1)
    return figure


def _draw_activity(axes: Axes, own: EdgeActivity) -> None:
    """A row for each module: grey where it was killed, pale in windows, dark where it was kept by choice; white: no such step."""
    num_rows = len(own.modules)
    _fill(axes, own.spans(), (-0.5, num_rows), _KILLED)
    _fill(axes, own.spans(windows=True), (-0.5, num_rows), _WINDOW)
    for row, module in enumerate(own.modules):
        _fill(axes, own.spans(module, windows=False), (row - 0.5, 1.0), _CHOSEN)
    end = max((segment.end for segment in own.segments), default=1)
    blocks = [row for row in range(1, num_rows) if block_of(own.modules[row]) != block_of(own.modules[row - 1])]
    parted = num_rows <= _MOST_PARTED_ROWS
    axes.hlines([row - 0.5 for row in blocks], 0, end, colors="white", linewidths=1.2 if parted else 0.4)
    if parted:
        axes.hlines([row - 0.5 for row in range(1, num_rows)], 0, end, colors="white", linewidths=0.6)
    axes.set_xlim(0, end)
    axes.set_xlabel("step")
    share = f"{100 * own.active_share:.1f} % active in the mean"
    axes.set_title(f"edge {own.edge}, {own.policy}: {counted(num_rows, 'module')}, {share}", loc="left")


def _fill(axes: Axes, spans: Sequence[tuple[int, int]], rows: tuple[float, float], colour: str) -> None:
    axes.broken_barh([(first, end - first) for first, end in spans], rows, facecolors=colour, linewidth=0)


def _draw_bars(axes: Axes, own: EdgeActivity, choice: Choice) -> None:
    scores = [_finite(choice.scores[name]) for name in own.modules]
    colours = [_CHOSEN if name in choice.active else _KILLED for name in own.modules]
    axes.barh(range(len(scores)), scores, height=0.8, color=colours, edgecolor="#808080", linewidth=0.4)
    axes.set_xlabel(f"at the choice of step {choice.step}")


def _draw_scores(axes: Axes, own: EdgeActivity, choices: Sequence[Choice]) -> AxesImage:
    """Modules x choices, and a dot in each cell whose module was kept."""
    values = [[_finite(choice.scores[name]) for choice in choices] for name in own.modules]
    known = [value for row in values for value in row if value > 0]
    least, most = min(known, default=0.0), max(known, default=1.0)
    logarithmic = most > _LOG_FROM * least > 0
    # A module that did not move at all has no logarithm: it is drawn as the one that moved least.
    shown = [[max(value, least) for value in row] for row in values] if logarithmic else values
    image = axes.imshow(
        shown, aspect="auto", interpolation="none", cmap="cividis", norm="log" if logarithmic else "linear",
        vmin=least if logarithmic else 0.0, vmax=most,
    )  # fmt: skip
    dots = [(x, y) for x, choice in enumerate(choices) for y, name in enumerate(own.modules) if name in choice.active]
    area = min(22.0, max(3.0, 1400.0 / len(own.modules)))
    axes.scatter([x for x, _ in dots], [y for _, y in dots], s=area, c="black", edgecolors="white", linewidths=0.5)
    every = math.ceil(len(choices) / 20)
    axes.set_xticks(range(0, len(choices), every), [str(choice.step) for choice in choices[::every]])
    axes.set_xlabel("step at which the choice was made")
    return image


def _module_axis(axes: Axes, modules: Sequence[str], inches: float) -> None:
    """Labels that do not touch: of every module, or of the first one in every block, every second block, ..."""
    row_points = inches * _POINTS / len(modules)
    per_block = sum(block_of(name) == block_of(modules[0]) for name in modules)
    every = 1
    while every * row_points < _LABEL_POINTS * 1.15:
        every = per_block if every == 1 and per_block > 1 else every + per_block
    axes.set_yticks(range(0, len(modules), every), short_labels(modules)[::every], fontsize=_LABEL_POINTS)
    axes.set_ylim(len(modules) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0 if every == 1 else 3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, *, kept: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    named = (("kept active by choice", _CHOSEN), ("all active, observed (window)", _WINDOW), ("killed", _KILLED))
    handles: list[Patch | Line2D] = [Patch(color=colour, label=label) for label, colour in named]
    if kept:
        handles.append(Line2D([], [], linestyle="", marker="o", color="black", markersize=4, label="kept by this choice"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def _finite(score: float | None) -> float:
    return math.nan if score is None else score


def _section(value: Mapping[str, object], name: str) -> Mapping[str, object]:
    inner = value.get(name)
    return inner if isinstance(inner, Mapping) else {}


def _save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    vector, pixels = folder / f"{name}.svg", folder / f"{name}.png"
    figure.savefig(vector, metadata={"Date": None})
    figure.set_layout_engine("none")  # everything keeps its place: the layout takes longer than the drawing
    figure.savefig(pixels, metadata={"Software": None})
    return vector, pixels
