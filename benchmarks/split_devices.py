"""Many devices on one host against one device that is given the same tokens: total tokens per second, and the host's memory.

Devices are processes of their own, eight at most, each with as many devices in threads as are needed; all take the same number of steps
and start together. One host process for every measurement. Pairs, one after the other.

Usage: python benchmarks/split_devices.py [--model 15M] [--devices 8 32] [--steps 4] [--repeats 3] [--threads 1]
       [--modes factored lent "lent, recomputed" "lent, recomputed, batched"] [--rows 4] [--tokens 128]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import itertools
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from sides import child, results, task
from sides.host import ROWS, TOKENS, host
from sides.options import Options

GOALS = {"tokens per second of 8 ÷ of one": 0.95, "lent, recomputed: memory of the host with 32 ÷ with one": 1.2}
MODES = ("factored", "lent", "lent, recomputed", "lent, recomputed, batched")
OPTIONS = {"recomputed": "--recompute", "batched": "--dynamic-batching"}
PROCESSES = 8


def device(folder: str, address: str, mode: str, shape: tuple[int, int], steps: int, count: int) -> None:
    """Some devices: warm up, say so, wait for the word, make their steps, say so."""
    ready, go = threading.Barrier(count + 1), threading.Event()
    threads = [threading.Thread(target=_device, args=(folder, address, mode, shape, steps, ready, go)) for _ in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    print("ready", flush=True)
    sys.stdin.readline()
    go.set()
    ready.wait()
    print("done", flush=True)
    sys.stdin.readline()
    ready.wait()
    for thread in threads:
        thread.join()


def _device(
    folder: str, address: str, mode: str, shape: tuple[int, int], steps: int, ready: threading.Barrier, go: threading.Event
) -> None:  # fmt: skip
    from atoll.jobs.split import HostAccess, join
    from sides.device import adapters, config, stepping

    side = join(folder, config(mode.partition(",")[0], False), HostAccess(address), ROWS * TOKENS)
    with stepping(side.base, adapters(Path(folder), "all"), *shape) as step:
        step()
        ready.wait()
        go.wait()
        for _ in range(steps):
            step()
        ready.wait()
        ready.wait()  # Sessions stay open until the host's memory is known.
    side.close()


def race(folder: Path, mode: str, shape: tuple[int, int], num_devices: int, steps: int, threads: int) -> dict[str, float]:
    """Seconds until all devices have made their steps, and the host's memory before the first of them and at its largest."""
    with host(folder, "--max-sessions", "64", *(OPTIONS[word] for word in mode.split(", ")[1:])) as address:
        process = next(p for p in psutil.Process().children() if "host" in p.cmdline())
        before = process.memory_info().rss
        counts = [len(range(number, num_devices, PROCESSES)) for number in range(min(num_devices, PROCESSES))]
        setting = os.environ | {"OMP_NUM_THREADS": str(threads)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": setting}
        devices = [
            subprocess.Popen(child.command(__file__, str(folder), address, mode, shape, steps, count), **pipes) for count in counts
        ]  # fmt: skip
        try:
            _all_say(devices, "ready")
            start = time.perf_counter()
            _say_to_all(devices)
            _all_say(devices, "done")
            seconds, peak = time.perf_counter() - start, _peak(process.pid)
            _say_to_all(devices)
        finally:
            for one in devices:
                one.wait(60)
    return {"seconds": seconds, "before_bytes": before, "peak_bytes": peak}


def _peak(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _all_say(devices: list[subprocess.Popen[str]], word: str) -> None:
    for one in devices:
        assert one.stdout is not None
        assert one.stdout.readline() == f"{word}\n"


def _say_to_all(devices: list[subprocess.Popen[str]]) -> None:
    for one in devices:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()


def main() -> None:
    """Measure and write."""
    options = Options(__doc__)
    options.size("--model", "15M", task.TINY)
    options.size("--devices", [8, 32], [1, 2])
    options.size("--steps", 4, 1)
    options.size("--repeats", 3, 1)
    options.size("--threads", 1, 1, help="of each device")
    options.size("--modes", list(MODES), list(MODES))
    options.size("--rows", ROWS, 1, help="of each device's micro-batch")
    options.size("--tokens", TOKENS, 8, help="of each row")
    given = options.parse()
    found: dict[str, Any] = {}
    shape = (given.rows, given.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = task.model_folder(given.model, Path(temporary))
        for mode, num_devices in itertools.product(given.modes, given.devices):
            rows: list[dict[str, float]] = []
            for _ in range(given.repeats):
                one = race(folder, mode, shape, 1, num_devices * given.steps, given.threads)
                many = race(folder, mode, shape, num_devices, given.steps, given.threads)
                rows.append({f"one_{key}": value for key, value in one.items()} | {f"many_{key}": value for key, value in many.items()})
            speed = statistics.median(row["one_seconds"] / row["many_seconds"] for row in rows)
            memory = statistics.median(row["many_peak_bytes"] / row["one_peak_bytes"] for row in rows)
            found[f"{mode}, {num_devices} devices"] = {"tokens_per_second_ratio": speed, "memory_ratio": memory, "repeats": rows}
            print(f"{mode:26} {num_devices:3} devices: tokens/s {speed:.3f} of one's, host's memory {memory:.3f} of one's", flush=True)
    settings = {"model": given.model, "steps": given.steps, "batch": shape, "goals": GOALS, "device_threads": given.threads}
    results.write(given.out, f"split_devices_{given.model}_{given.rows}x{given.tokens}", settings, found)


if __name__ == "__main__":
    child.run(main, device)
