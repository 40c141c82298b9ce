"""From the measured cost of an update to a coordinator's rounds of 10 to 10,000 edges: scale.md and scale.png."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sides import results

NAME = "scale"
HUNDRED, THOUSAND, WIDE = "512 wide, 100 edges", "512 wide, 1000 edges", "1024 wide, 300 edges"
NEEDS = {HUNDRED, THOUSAND, WIDE}
"""The rows from which constants are taken."""
EDGES = (10, 100, 1000, 10_000)
LINK_BITS = 1e9


@dataclass(frozen=True, slots=True)
class Size:
    """Square projections of one width with LoRA."""

    name: str
    width: int
    modules: int
    rank: int = 8

    @property
    def numbers(self) -> int:
        """Of one update."""
        return 2 * self.rank * self.width * self.modules

    @property
    def dense(self) -> int:
        """Of the products."""
        return self.width**2 * self.modules


SIZES = (Size("as measured: 512 wide, 4 blocks", 512, 16), Size("as a 1B: 2,048 wide, 16 blocks", 2048, 64),
         Size("as a 7B: 4,096 wide, 32 blocks", 4096, 128))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one thread, and bytes."""

    ready_bytes: float
    bytes_per_number: float
    spool: float
    """Seconds a number: ask, check, write."""
    add: float
    """Seconds a number of the product and update, once the sum is dense."""
    finish: float
    """Seconds a number of the products as they are held, and rank: their largest singular values."""


def costs(found: dict[str, Any]) -> Costs:
    """From the rows of scale.json."""
    hundred, thousand, wide = found[HUNDRED], found[THOUSAND], found[WIDE]
    add = (thousand["aggregated_seconds"] - hundred["aggregated_seconds"]) / 900 / thousand["dense_numbers"]
    finishes = [(row["aggregated_seconds"] - row["edges"] * add * row["dense_numbers"]) / row["dense_numbers"] / SIZES[0].rank
                for row in (hundred, wide)]  # fmt: skip
    return Costs(
        thousand["ready_bytes"], thousand["up_bytes"] / thousand["numbers"],
        thousand["asked_and_spooled_seconds"] / 1000 / thousand["numbers"], add, max(finishes),
    )  # fmt: skip


def round_of(size: Size, edges: int, cost: Costs) -> dict[str, float]:
    """What one round takes beside the edges' own time."""
    is_dense = edges > size.width / (2 * size.rank)
    held = 8 * size.dense if is_dense else 4 * edges * size.numbers
    # Before the sum is dense, adding is putting aside, and singular values are those of thin factors.
    finish = cost.finish * size.rank * (size.dense if is_dense else edges * size.numbers)
    return {
        "memory": cost.ready_bytes + held, "moved": 2 * edges * cost.bytes_per_number * size.numbers, "disk": 4.0 * edges * size.numbers,
        "link": 16 * edges * cost.bytes_per_number * size.numbers / LINK_BITS,
        "processor": edges * (cost.spool * size.numbers + (cost.add * size.dense if is_dense else 0)) + finish,
    }  # fmt: skip


def write(out: Path) -> None:
    """Write table and figure beside scale.json."""
    cost = costs((results.read(out, NAME) or {})["results"])
    text = table(cost)
    (out / f"{NAME}.md").write_text(text, encoding="utf-8")
    _draw(out, cost)
    print(text)


def table(cost: Costs) -> str:
    """What scale.md says."""
    lines = [
        f"Constants: {1e9 * cost.spool:.1f} ns a number to ask, check and spool; {1e9 * cost.add:.2f} ns a number of the products to add "
        f"an update;\n{1e9 * cost.finish:.1f} ns a number held and rank to finish; {cost.bytes_per_number:.3f} bytes a number sent.",
        "",
    ]  # fmt: skip
    for size in SIZES:
        lines += [
            f"**{size.name}**: {size.numbers / 1e6:.2f} M numbers, {4 * size.numbers / 1e6:.1f} MB an update.", "",
            "| edges | memory | moved a round | spool on disk | link at 1 Gbit/s | one thread |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for edges in EDGES:
            one = round_of(size, edges, cost)
            gigabytes = [f"{one[key] / 1e9:.2f} GB" for key in ("memory", "moved", "disk")]
            lines.append(f"| {edges:,} | {' | '.join(gigabytes)} | {_time(one['link'])} | {_time(one['processor'])} |")
        lines.append("")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _draw(out: Path, cost: Costs) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for size in SIZES:
        rounds = [round_of(size, edges, cost) for edges in EDGES]
        panels[0].plot(EDGES, [one["memory"] / 1e9 for one in rounds], marker="o", label=size.name)
        panels[1].plot(EDGES, [one["processor"] + one["link"] for one in rounds], marker="o", label=size.name)
    for panel, label in zip(panels, ("coordinator's memory, GB", "link and one thread, s a round"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="edges", ylabel=label)
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(out / f"{NAME}.png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
