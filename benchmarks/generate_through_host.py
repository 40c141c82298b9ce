"""Tokens a second of a completion whose middle blocks run in a host, with keys and values kept there and without, beside the whole base.

Two hosts of their own processes (`atoll host`, one with `--cache 0`). Every repeat takes turns; ratios of medians are what counts.

Usage: python benchmarks/generate_through_host.py [--repeats 3] [--models tiny 15M] [--prompt 64] [--new 64] [--modes lent dense]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from atoll.adapters.attach import attached
from atoll.base.load import Base, load_base
from atoll.jobs.split import HostAccess, join
from atoll.tasks.scoring.generation import generate_texts
from sides import results, task
from sides.device import adapters, config
from sides.host import ROWS, TOKENS, host
from sides.options import Options


@contextmanager
def writing(base: Base, folder: Path, prompt: int, new: int) -> Iterator[Callable[[], tuple[float, str]]]:
    """A function that writes one completion, and returns seconds and text. Nothing ends it early."""
    model, tokenizer = base.model, base.tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    ids = [3 + i % 50 for i in range(prompt)]
    with attached(model, adapters(folder, "all")):

        def write() -> tuple[float, str]:
            start = time.perf_counter()
            (text,) = generate_texts(model, tokenizer, [ids], max_new_tokens=new, batch_size=1)
            return time.perf_counter() - start, text

        yield write


def measure(folder: Path, kept: str, whole: str, mode: str, prompt: int, new: int, repeats: int) -> dict[str, float]:
    """One row of the table."""
    settings, most = config(mode, link=False), max(ROWS * TOKENS, prompt + new)
    sides = [join(str(folder), settings, HostAccess(address), most) for address in (kept, whole)]
    bases = [sides[0].base, sides[1].base, load_base(str(folder))]
    with (
        writing(bases[0], folder, prompt, new) as with_cache, writing(bases[1], folder, prompt, new) as without,
        writing(bases[2], folder, prompt, new) as local,
    ):  # fmt: skip
        writers = (with_cache, without, local)
        assert len({write()[1] for write in writers}) == 1, "three ways to the same text"
        before = [side.client.account.copy() for side in sides]
        times = [[write()[0] for write in writers] for _ in range(repeats)]
        moved = [side.client.account.since(one) for side, one in zip(sides, before, strict=True)]
    for side in sides:
        side.close()
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    sent, sent_whole = ((one.sent.total() + one.received.total()) / repeats for one in moved)
    return {
        "kept_tokens_per_second": new / seconds[0], "whole_rows_tokens_per_second": new / seconds[1],
        "local_tokens_per_second": new / seconds[2], "kept_to_whole_rows": statistics.median(b / a for a, b, _ in times),
        "local_to_kept": statistics.median(a / c for a, _, c in times),
        "kept_bytes": sent, "whole_rows_bytes": sent_whole,
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    options = Options(__doc__)
    options.size("--repeats", 3, 1)
    options.size("--models", [task.TINY, "15M"], [task.TINY])
    options.size("--prompt", 64, 8)
    options.size("--new", 64, 8)
    options.size("--modes", ["lent", "dense"], ["lent"])
    given = options.parse()
    found: dict[str, dict[str, float]] = {}
    for name in given.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = task.model_folder(name, Path(temporary))
            with host(folder) as kept, host(folder, "--cache", "0") as whole:
                for mode in given.modes:
                    row = measure(folder, kept, whole, mode, given.prompt, given.new, given.repeats)
                    found[f"{name} {mode}"] = row
                    print(f"{name:5} {mode:9}", " ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    settings = {"prompt": given.prompt, "new": given.new, "repeats": given.repeats, "threads": torch.get_num_threads()}
    results.write(given.out, "generate_through_host", settings, found)


if __name__ == "__main__":
    main()
