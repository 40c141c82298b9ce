"""Many devices on one host against one device that is given the same tokens: total tokens per second, and the host's memory.

Every device is a process of its own; all take the same number of steps and start together. One host process, random Llama of 15 M.

Usage: python benchmarks/split_devices.py [--devices 8] [--steps 4] [--repeats 3] [--threads 2]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from sides import child, results, task
from sides.host import ROWS, TOKENS, host
from sides.options import Options

GOALS = {"tokens per second of all ÷ of one": 0.9}


def device(folder: str, address: str, steps: int) -> None:
    """One device: warm up, say so, wait for the word, make its steps, say so."""
    from atoll.jobs.split import HostAccess, join
    from sides.device import adapters, config, stepping

    side = join(folder, config("factored", False), HostAccess(address), ROWS * TOKENS)
    with stepping(side.base, adapters(Path(folder), "all")) as step:
        step()
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(steps):
            step()
        print("done", flush=True)
        sys.stdin.readline()
    side.close()


def race(folder: Path, address: str, num_devices: int, steps: int, threads: int) -> tuple[float, int]:
    """Seconds until all devices have made their steps, and the host's memory at its largest."""
    process = next(p for p in psutil.Process().children() if "host" in p.cmdline())
    command = child.command(__file__, str(folder), address, steps)
    setting = os.environ | {"OMP_NUM_THREADS": str(threads)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": setting}
    devices = [subprocess.Popen(command, **pipes) for _ in range(num_devices)]
    try:
        for one in devices:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        start = time.perf_counter()
        for one in devices:
            _say(one)
        for one in devices:
            assert one.stdout is not None
            assert one.stdout.readline() == "done\n"
        seconds, resident = time.perf_counter() - start, process.memory_info().rss
        for one in devices:
            _say(one)
    finally:
        for one in devices:
            one.wait(60)
    return seconds, resident


def _say(one: subprocess.Popen[str]) -> None:
    assert one.stdin is not None
    one.stdin.write("go\n")
    one.stdin.flush()


def main() -> None:
    """Measure and write."""
    options = Options(__doc__)
    options.size("--model", "15M", task.TINY)
    options.size("--devices", 8, 1)
    options.size("--steps", 4, 1)
    options.size("--repeats", 3, 1)
    options.size("--threads", 2, 1, help="of each device")
    given = options.parse()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = task.model_folder(given.model, Path(temporary))
        with host(folder) as address:
            for _ in range(given.repeats):
                one, one_bytes = race(folder, address, 1, given.devices * given.steps, given.threads)
                many, many_bytes = race(folder, address, given.devices, given.steps, given.threads)
                seconds = {"one_seconds": one, "many_seconds": many, "ratio": one / many}
                rows.append(seconds | {"one_bytes": one_bytes, "many_bytes": many_bytes})
                print({key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
    settings = {"model": given.model, "devices": given.devices, "steps": given.steps, "batch": (ROWS, TOKENS), "goals": GOALS}
    ratio = statistics.median(row["ratio"] for row in rows)
    name = f"split_devices_{given.threads}_threads"
    results.write(given.out, name, settings | {"device_threads": given.threads}, {"ratio": ratio, "repeats": rows})


if __name__ == "__main__":
    child.run(main, device)
