"""Quality against traffic for all settings, one panel for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sides.kr_runs import BASE_SETTING, Record
from sides.kr_settings import FULL, KR, LEAN, LOTTERY, OTHERS, policy_of
from sides.kr_table import Line, lines
from sides.kr_tasks import TASKS

# Okabe and Ito's colours, told apart by most eyes.
_POLICIES = (FULL, KR, LOTTERY, *OTHERS)
COLOURS = dict(
    zip(_POLICIES, ("#000000", "#D55E00", "#56B4E9", "#0072B2", "#999999", "#009E73", "#CC79A7", "#E69F00"), strict=True)
)
MARKS = dict(zip(_POLICIES, "so*DvP^X", strict=True))


def draw(out: Path, name: str, found: Mapping[str, Sequence[Record]]) -> None:
    """The figure NAME.png; nothing where no task has a run of the full pool."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_task = {task: rows for task, records in found.items() if (rows := lines(task, records))}
    if not by_task:
        return
    figure, panels = pyplot.subplots(1, len(by_task), figsize=(4.6 * len(by_task), 4.2), squeeze=False, layout="constrained")
    for panel, (task, rows) in zip(panels[0], by_task.items(), strict=True):
        _panel(panel, task, rows)
    handles = {policy: handle for panel in panels[0] for handle, policy in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(out / f"{name}.png", dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _panel(panel: Any, task: str, rows: Sequence[Line]) -> None:
    for row in rows:
        policy = policy_of(row.setting)
        variant = row.setting.removeprefix(policy).removeprefix(", ")
        if row.setting in LEAN or policy == BASE_SETTING:
            continue
        is_main = not variant
        panel.errorbar(
            100 * row.shared.mean, row.loss.mean, yerr=row.loss.deviation, fmt=MARKS[policy], color=COLOURS[policy], capsize=2,
            markersize=8 if is_main else 5, alpha=1.0 if is_main else 0.55, label=policy if is_main else None, elinewidth=0.8,
            zorder=3 if policy == KR else 2,
        )  # fmt: skip
        if variant and policy in (KR, LOTTERY):
            panel.annotate(variant, (100 * row.shared.mean, row.loss.mean), fontsize=6, xytext=(3, 3), textcoords="offset points")
    _full_pool_band(panel, next(row for row in rows if row.setting == FULL))
    panel.set_xscale("log")
    panel.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    panel.minorticks_off()
    panel.set(title=TASKS[task].title, xlabel="bytes by formula, shared, in % of the full pool's", ylabel="test loss, nats per token")
    panel.axvline(12.5, color="#999999", linewidth=0.8, linestyle=":")


def _full_pool_band(panel: Any, full: Line) -> None:
    """The full pool's loss plus and minus one standard deviation."""
    spread = full.loss.deviation or 0.0
    panel.axhspan(full.loss.mean - spread, full.loss.mean + spread, color="#000000", alpha=0.08, linewidth=0)
