"""Memory and time of a federation of 10, 100 and 1,000 edges in one process.

The built-in base; 4,000 rows of the demo (each of its rows again and again) dealt to however many edges there are, so that data take the
same memory in every row of the table; four kinds of machines; two rounds of two steps each, Adam's moments kept. Every row is a process of
its own. Planning is timed apart, by `as-written` and by the planner with a deadline.

Usage: python benchmarks/thousand_edges.py [--edges 10 100 1000] [--aggregation exact-svd]
"""

from __future__ import annotations

import csv
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}  # before torch

from sides import child, results
from sides.options import Options

ROUNDS, STEPS = 2, 2
KINDS = (
    ("4 GB", "50 GFLOP/s", "100 Mbit/s"), ("2 GB", "20 GFLOP/s", "50 Mbit/s"), ("1 GB", "10 GFLOP/s", "20 Mbit/s"),
    ("1 GB", "5 GFLOP/s", "10 Mbit/s"),
)  # fmt: skip
GOAL_RATIO = 1.1
"""Peak memory with the most edges, against that with the fewest."""


def write_run(folder: Path, num_edges: int, num_rows: int, aggregation: str) -> Path:
    """rows.csv and run.toml."""
    from atoll.embedded import demo_path

    with demo_path("train").open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *(rows[number % len(rows)] for number in range(num_rows))])
    lines = [
        "[run]", f"rounds = {ROUNDS}", "[data]", 'train = "rows.csv"', 'eval = "rows.csv"', "eval_rows = 4",
        'prompt = "{mr} ->"', 'completion = " {ref}"', "[train]", f"local_steps = {STEPS}", "batch_size = 2",
        "[federated]", f'aggregation = "{aggregation}"', "[evaluate]", "batch_size = 4",
    ]  # fmt: skip
    for number in range(num_edges):
        memory, flops, bandwidth = KINDS[number % len(KINDS)]
        lines += ["[[edge]]", f'name = "edge{number:04}"', f'memory = "{memory}"', f'flops = "{flops}"', f'bandwidth = "{bandwidth}"']
    path = folder / "run.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def measure(num_edges: int, num_rows: int, aggregation: str) -> dict[str, Any]:
    """One row of the table: plan, make ready, train."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(write_run(Path(folder), num_edges, num_rows, aggregation))


def _measure(config: Path) -> dict[str, Any]:
    import atoll
    from atoll.commands.train import train_job
    from atoll.cost.meters import resident_peak_bytes
    from atoll.jobs.job import prepare

    seconds: dict[str, float] = {}
    planner = ["plan.policy=fedpipe", "plan.importance=none", "plan.round_deadline=20 s"]
    for name, overrides in (("plan as written", []), ("plan by the planner", planner)):
        start = time.perf_counter()
        atoll.plan(config, overrides=overrides)
        seconds[name] = time.perf_counter() - start
    start = time.perf_counter()
    job = prepare(config)
    seconds["make ready"] = time.perf_counter() - start
    ready = _resident()
    start = time.perf_counter()
    result = train_job(job, config.parent / "out", [])
    seconds["train"] = time.perf_counter() - start
    return {
        "ready_bytes": ready, "end_bytes": _resident(), "peak_bytes": resident_peak_bytes(), "seconds": seconds,
        "edges": len(result.summary.edges), "steps": sum(edge.steps for edge in result.summary.edges),
        "events_bytes": (result.run_dir / "events.jsonl").stat().st_size,
    }  # fmt: skip


def _resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    """Measure, print and keep."""
    options = Options(__doc__)
    options.size("--edges", [10, 100, 1000], [2])
    options.size("--rows", 4000, 12)
    options.add_argument("--aggregation", default="exact-svd")
    given, found = options.parse(), {}
    for number in given.edges:
        found[f"{number} edges"] = row = child.figures(__file__, number, given.rows, given.aggregation)
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in row["seconds"].items())
        print(f"{number} edges: ready {row['ready_bytes'] / 1e6:.0f} MB, peak {row['peak_bytes'] / 1e6:.0f} MB; {parts}", flush=True)
    peaks = [row["peak_bytes"] for row in found.values()]
    ratio = peaks[-1] / peaks[0]
    print(f"peak memory, last against first: {ratio:.3f} (goal: at most {GOAL_RATIO})")
    config = {"edges": given.edges, "rounds": ROUNDS, "steps": STEPS, "rows": given.rows, "base": "tiny", "aggregation": given.aggregation,
              "goal_ratio": GOAL_RATIO}  # fmt: skip
    results.write(given.out, "thousand_edges", config, {**found, "peak_ratio": ratio})


if __name__ == "__main__":
    child.run(main, measure)
