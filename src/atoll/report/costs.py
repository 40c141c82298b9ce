"""What a run cost beside what it would have cost with every module active all the time, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atoll.runs.summary import EdgeCompute, Summary, Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_DONE, _FULL_POOL = "#0072B2", "#BDBDBD"


@dataclass(frozen=True, slots=True)
class Pair:
    """One cost as it was, and as the full pool's would have been; None where that is not known or the same."""

    name: str
    done: float
    full_pool: float | None
    note: str = ""
    """Said in place of the saving where there is no full pool."""

    @property
    def saving(self) -> str:
        """In percent of the full pool, in words; the note where there is none."""
        if not self.full_pool:
            return self.note
        percent = round(100 * (1 - self.done / self.full_pool), 1) or 0.0  # no minus before a zero
        return f"{percent:.1f} % saved" if percent >= 0 else f"{-percent:.1f} % more"


def compute_pairs(compute: EdgeCompute) -> tuple[Pair, ...]:
    """The parts of the edges' compute, in FLOP; a part that costs nothing is left out."""
    pairs = (
        Pair("adapters", compute.adapter_flops, compute.full_pool_adapter_flops or None),
        Pair("blocks kept on the edge", compute.block_flops, compute.full_pool_block_flops or None),
        Pair("head", compute.head_flops, None, "the same for the full pool"),
    )
    return tuple(pair for pair in pairs if pair.done or pair.full_pool)


def wire_pairs(traffic: Traffic) -> tuple[Pair, ...]:
    """What edges exchanged with their host, in bytes both ways; nothing for a run without a host."""
    if traffic.formula_shared_bytes is None or traffic.formula_unshared_bytes is None:
        return ()
    written = sum(sum((kinds or {}).values()) for kinds in (traffic.up_bytes_by_kind, traffic.down_bytes_by_kind))
    pairs = (
        Pair("shared rule, by formula", traffic.formula_shared_bytes, traffic.full_pool_shared_bytes),
        Pair("unshared rule, by formula", traffic.formula_unshared_bytes, traffic.full_pool_unshared_bytes),
        Pair("really written", written, None, "no full-pool run to compare with"),
    )
    return tuple(pair for pair in pairs if pair.done or pair.full_pool)


def draw_costs(summary: Summary, policy: str) -> Figure:
    """A row of pairs for the edges' compute and, where they have a host, one for the wire; each bar with its number."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups = [("device compute", "FLOP", compute_pairs(summary.edge_compute)), ("on the wire", "B", wire_pairs(summary.traffic))]
    rows = [(group, unit, pairs) for group, unit, pairs in groups if pairs]
    num_columns = max((len(pairs) for _, _, pairs in rows), default=1)
    figure = Figure(figsize=(max(2.9 * num_columns, 6.0), 0.6 + 3.0 * max(len(rows), 1)), layout="constrained")
    panels = figure.subplots(max(len(rows), 1), num_columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for (group, unit, pairs), row in zip(rows, panels, strict=False):
        for pair, axes in zip(pairs, row, strict=False):
            _draw_pair(axes, f"{group}: {pair.name}", pair, unit)
    handles = [Patch(color=_DONE, label=f"as done ({policy})"), Patch(color=_FULL_POOL, label="full pool at every step")]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def in_one_unit(numbers: Sequence[float], unit: str) -> tuple[str, ...]:
    """The numbers for people, three significant digits, all with the decimal prefix that suits the largest."""
    largest = max(numbers, default=0.0)
    prefix, scale = next(((name, size) for name, size in _PREFIXES if largest >= 0.9995 * size), ("", 1.0))
    return tuple(f"{number / scale:.3g} {prefix}{unit}" for number in numbers)


def _draw_pair(axes: Axes, title: str, pair: Pair, unit: str) -> None:
    heights, places = ([pair.done], [0.5]) if pair.full_pool is None else ([pair.done, pair.full_pool], [0.0, 1.0])
    bars = axes.bar(places, heights, width=0.7, color=[_DONE, _FULL_POOL][: len(heights)], linewidth=0)
    axes.bar_label(bars, in_one_unit(heights, unit), padding=2)
    axes.set_xlim(-0.6, 1.6)
    axes.set_ylim(0, 1.12 * max(heights) or 1)
    axes.hlines(0, -0.6, 1.6, colors="black", linewidth=1.2)
    axes.set_title(f"{title}\n{pair.saving}", y=1.0)  # a given height: left to itself, each panel finds its own
