"""The figure of a comparison: the loss of every run, and the bytes that its edges and its coordinator exchanged."""

from __future__ import annotations

from pathlib import Path

from atoll.report.many.comparison import Comparison

_COLOR, _FAINT = "#0072B2", "#6BB9EC"
_MEGABYTE = 1e6


def write_comparison_figure(comparison: Comparison, path: Path) -> Path | None:
    """Write it as PNG; None where no run was scored. Equal comparisons give equal bytes."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    variants = {name: numbers for name, numbers in comparison.variants.items() if "loss" in numbers}
    if not variants:
        return None
    names = list(variants)[::-1]
    # A person's own matplotlibrc must not change the bytes; what was set before holds again after the block.
    with context(["default", {"font.size": 9.0}]):
        figure = Figure(figsize=(9.0, 1.2 + 0.34 * len(names)), layout="constrained")
        loss, traffic = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        for place, name in enumerate(names):
            runs = [run.numbers["loss"] for run in comparison.runs if run.variant == name]
            loss.plot(runs, [place] * len(runs), "o", color=_FAINT, markersize=4)
            loss.plot([variants[name]["loss"].mean], [place], "|", color=_COLOR, markersize=14, markeredgewidth=2.5)
            traffic.barh(place, variants[name]["bytes"].mean / _MEGABYTE, color=_COLOR, height=0.6)
        loss.set_yticks(range(len(names)), names)
        loss.set_xlabel("loss on held-out rows (nats/token): each seed, and their mean")
        traffic.set_xlabel("traffic (MB)")
        for panel in (loss, traffic):
            panel.grid(axis="x", linewidth=0.4)
            panel.set_axisbelow(True)
        figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
