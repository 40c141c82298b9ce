"""What several variants of one run came to, over several seeds: as numbers with their spread, and as a table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from atoll.report.tables import TITLES, Listing, number_text
from atoll.runs.layout import RunDirectory
from atoll.runs.summary import Scores, Summary
from atoll.units import counted, format_bytes, format_seconds

_COSTS: Mapping[str, Callable[[Summary], float | None]] = {
    "bytes": lambda summary: float(summary.traffic.up_bytes + summary.traffic.down_bytes),
    "flops": lambda summary: summary.edge_compute.flops,
    "num_trainable": lambda summary: max((float(edge.num_trainable) for edge in summary.edges), default=None),
    "simulated_seconds": lambda summary: summary.seconds.simulated,
    "wall_seconds": lambda summary: summary.seconds.wall,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """A number over seeds; `deviation` is the sample's standard deviation, None for one seed."""

    mean: float
    deviation: float | None
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Of at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, min(values), max(values))


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run of a comparison."""

    variant: str
    seed: int
    run_dir: Path
    summary: Summary

    @property
    def numbers(self) -> dict[str, float]:
        """Scores of what was trained, by their own names, and what it cost."""
        scores = self.summary.eval.adapted or {}
        costs = {name: value for name, cost in _COSTS.items() if (value := cost(self.summary)) is not None}
        return {**{name: value for name, value in scores.items() if value is not None and not name.startswith("num_")}, **costs}


@dataclass(frozen=True, slots=True)
class Comparison:
    """All runs, variant by variant, and where they lie."""

    folder: Path
    runs: tuple[ComparedRun, ...]

    @property
    def variants(self) -> dict[str, dict[str, Measured]]:
        """Every number of every variant that all of its runs have."""
        found: dict[str, dict[str, Measured]] = {}
        for name in dict.fromkeys(run.variant for run in self.runs):
            rows = [run.numbers for run in self.runs if run.variant == name]
            found[name] = {key: Measured.of([row[key] for row in rows]) for key in rows[0] if all(key in row for row in rows)}
        return found

    @property
    def base(self) -> Scores | None:
        """Scores of the base, where they are the same in all runs."""
        rows = [run.summary.eval.base for run in self.runs]
        return rows[0] if rows and all(row == rows[0] for row in rows) else None

    @property
    def alike(self) -> list[list[str]]:
        """Variants that came to the same adapters with every seed: what sets them apart has changed nothing."""
        found: dict[object, list[str]] = {}
        for name in dict.fromkeys(run.variant for run in self.runs):
            adapters = tuple((run.seed, _digest(run.run_dir)) for run in self.runs if run.variant == name)
            found.setdefault(adapters if all(digest for _, digest in adapters) else name, []).append(name)
        return [names for names in found.values() if len(names) > 1]

    def to_json(self) -> dict[str, object]:
        """As compare.json holds it."""
        variants = {
            name: {
                key: {"mean": one.mean, "deviation": one.deviation, "min": one.least, "max": one.most} for key, one in numbers.items()
            } for name, numbers in self.variants.items()
        }  # fmt: skip
        runs = [{"variant": run.variant, "seed": run.seed, "run_dir": str(run.run_dir), **run.numbers} for run in self.runs]
        return {"folder": str(self.folder), "base": self.base, "variants": variants, "runs": runs, "alike": self.alike}


def _digest(run_dir: Path) -> str:
    """SHA-256 of a run's adapter; empty: it has none of low rank."""
    file = RunDirectory(run_dir).adapter / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def comparison_table(comparison: Comparison) -> Listing:
    """A line for each variant: scores with their spread over seeds, bytes and time; the lowest mean loss in bold."""
    variants, base = comparison.variants, comparison.base
    scores = [key for key in dict.fromkeys(key for numbers in variants.values() for key in numbers) if key not in _COSTS]
    times = [key for key in ("simulated_seconds", "wall_seconds") if any(key in numbers for numbers in variants.values())][:1]
    seeds = len({run.seed for run in comparison.runs})
    spread = f"mean ± standard deviation over {counted(seeds, 'seed')}" if seeds > 1 else "one seed: no spread"
    titles = {**TITLES, "bytes": "traffic", "simulated_seconds": "simulated time", "wall_seconds": "time"}
    rows = [] if base is None else [("base", *(number_text(base.get(key), key) for key in scores), *("" for _ in ("bytes", *times)))]
    least = min((numbers["loss"].mean for numbers in variants.values() if "loss" in numbers), default=None)
    best = set[int]()
    for name, numbers in variants.items():
        if len(variants) > 1 and "loss" in numbers and numbers["loss"].mean == least:
            best.add(len(rows))
        cells = [_spread(numbers.get(key), key) for key in scores]
        cells.append(format_bytes(round(numbers["bytes"].mean)))
        rows.append((name, *cells, *(format_seconds(numbers[key].mean) if key in numbers else "-" for key in times)))
    header = ("", *(titles.get(key, key.replace("_", " ")) for key in (*scores, "bytes", *times)))
    return Listing(f"held-out rows, {spread}", header, rows, best=frozenset(best))


def _spread(measured: Measured | None, name: str) -> str:
    if measured is None:
        return "-"
    return number_text(measured.mean, name) + (f" ± {number_text(measured.deviation, name)}" if measured.deviation is not None else "")
