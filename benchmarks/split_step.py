"""A training step through a host on loopback against its bound: the same step with the whole base here, plus its bytes at bare gRPC's rate.

The host is a process of its own (`atoll host`). Every repeat takes turns: local step, split step, a transfer of the same bytes in frames
of the same size over a bare gRPC stream. Ratios of medians are what counts.

Usage: python benchmarks/split_step.py [--repeats 5] [--models 15M 100M] [--modes dense factored lent "lent, recomputed"] [--link]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from atoll.base.load import Base, load_base
from atoll.base.read_shapes import read_shapes
from atoll.cost.split_traffic import step_bytes, step_round_trips
from atoll.jobs.split import HostAccess, SplitSide, join
from sides import results, task
from sides.device import SLOW_BITS, SLOW_SECONDS, adapters, batch, config, stepping
from sides.host import RANK, ROWS, TOKENS, host
from sides.line import Line
from sides.options import Options

GOALS = {"loopback": 1.10, "slow link": 1.15, "dense ÷ lent on the slow link": 4, "bytes": 1.02}
MODES = ("dense", "factored", "lent", "lent, recomputed")


def measure(folder: Path, base: Base, address: str, mode: str, active: str, repeats: int, link: bool) -> dict[str, float]:
    """One row of the table."""
    wire_mode: Any = mode.partition(",")[0]
    settings, state = config(wire_mode, link), adapters(folder, active)
    side: SplitSide = join(str(folder), settings, HostAccess(address), ROWS * TOKENS)
    shapes, ranks = read_shapes(str(folder)), state.ranks
    num_label_tokens = batch(shapes.vocab_size).num_label_tokens
    formula = step_bytes(settings, shapes, ranks, wire_mode, num_tokens=ROWS * TOKENS, num_label_tokens=num_label_tokens)
    with stepping(side.base, state) as split_step, stepping(base, state) as local_step, Line() as line:
        local_step()
        split_step()
        before = side.client.account.copy()
        times = [(local_step(), split_step(), line.seconds(formula.up_bytes, formula.down_bytes)) for _ in range(repeats)]
        moved = side.client.account.since(before)
    side.close()
    local, split, line_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    written = (moved.sent.total() + moved.received.total()) / repeats
    round_trips = step_round_trips(settings, shapes, ranks, wire_mode)
    # Question and answer take turns, so that the two directions of the link are never busy at once.
    slow = 8 * formula.shared_bytes / SLOW_BITS + 2 * SLOW_SECONDS * round_trips if link else line_seconds
    return {
        "local_seconds": local, "split_seconds": split, "line_seconds": line_seconds, "bound_seconds": local + slow,
        "ratio": statistics.median(there / (here + (slow if link else bare)) for here, there, bare in times), "bytes": written,
        "ratio_to_local": statistics.median(there / here for here, there, _ in times),
        "bytes_to_formula": written / formula.shared_bytes, "round_trips": round_trips,
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    options = Options(__doc__)
    options.size("--repeats", 5, 1)
    options.size("--models", ["15M", "100M"], [task.TINY])
    options.size("--modes", list(MODES), list(MODES))
    options.add_argument("--link", action="store_true", help="over a link of 100 Mbit/s and 50 ms")
    given = options.parse()
    found: dict[str, Any] = {}
    for name in given.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = task.model_folder(name, Path(temporary))
            base = load_base(str(folder))
            for mode, active in itertools.product(given.modes, ("all", "1/8")):
                with host(folder, *(["--recompute"] if mode.endswith("recomputed") else [])) as address:
                    row = measure(folder, base, address, mode, active, given.repeats, given.link)
                found[f"{name} {mode} {active}"] = row
                print(f"{name:5} {mode:9} {active:4}", " ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    settings = {"rows": ROWS, "tokens": TOKENS, "rank": RANK, "repeats": given.repeats, "threads": torch.get_num_threads(), "goals": GOALS}
    kept = "split_slow_link" if given.link else "split_step"
    results.write(given.out, f"{kept}_{'_'.join(given.models)}", settings, found)


if __name__ == "__main__":
    main()
