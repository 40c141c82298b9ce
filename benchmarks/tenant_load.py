"""Many tenants on one host, one of which does its worst within its limits: what the others notice of it, and what the host keeps.

The host is a process of its own with TLS, a certificate for each tenant and the limits that `atoll fleet init` would write. Honest devices
(threads of one process) train with a pause after each step, for what else a device has to do. First one of them is alone. Then all are
there, and the bad tenant (a process of its own) comes and goes, so that times with it and without it lie side by side. While it is there:
the largest and the most padded exchanges without a pause, sixty silent streams, its part fetched slowly, parts that are not its own, Status
without end. At last many sessions are opened and closed.

Usage: python benchmarks/tenant_load.py [--devices 16] [--minutes 5] [--sessions 500] [--size 15M] [--pause 20]
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from atoll.split.certificates import make_certificates
from atoll.split.device.blocks import Given
from sides import results, task
from sides.options import Options
from sides.tenants import CUT, SIZES, Honest, Size, Worst, access, side_of

GOALS = {"seconds_per_token, beside the worst ÷ alone": 2.0, "lost": 0, "growth of memory and threads over the sessions": 0.0}
WORST = "worst"
HELD = ("resident_bytes", "threads", "files")


class Host:
    """The host's process, looked at from outside."""

    def __init__(self, process: subprocess.Popen[str], address: str, metrics: str) -> None:
        self.address, self._metrics, self._process = address, metrics, psutil.Process(process.pid)
        self.samples: list[tuple[int, int, int]] = []
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            self.samples.append(self.now())

    def now(self) -> tuple[int, int, int]:
        """Resident bytes, threads and open files."""
        return self._process.memory_info().rss, self._process.num_threads(), self._process.num_fds()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._watch.join()

    def figures(self) -> dict[str, float]:
        """Its metrics, by name and labels."""
        with urllib.request.urlopen(self._metrics, timeout=30) as page:
            text = page.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {" ".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


@contextmanager
def host(base: str, size: Size, folder: Path, tenants: list[str]) -> Iterator[Host]:
    """A host with limits, once it listens."""
    make_certificates(folder, [], tenants)
    command = [sys.executable, "-m", "atoll", "host", "--model", base, "--listen", "127.0.0.1:0", "--metrics", ":0", "--metrics-tenants"]
    command += ["--tls-cert", str(folder / "host.pem"), "--tls-key", str(folder / "host.key"), "--client-ca", str(folder / "ca.pem")]
    command += ["--max-part", ",".join(map(str, CUT)), "--max-tokens", str(size.most), "--max-tenant-sessions", "2"]
    command += ["--max-sessions", str(max(16, 2 * len(tenants))), "--audit", str(folder / "audit.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        metrics = process.stdout.readline().split()[-1]
        words = process.stdout.readline().split()
        running = Host(process, words[words.index("on") + 1], metrics)
        yield running
        running.close()
    finally:
        process.terminate()
        process.wait()


@contextmanager
def training(base: str, size: Size, address: str, folder: Path, names: list[str], pause: float) -> Iterator[list[Honest]]:
    """All of them at once, while what is inside goes on."""
    devices = [
        Honest(base, size, access(address, folder, name), number, pause) for number, name in enumerate(names)
    ]
    until = threading.Event()
    threads = [threading.Thread(target=one.train, args=(until,)) for one in devices]
    for thread in threads:
        thread.start()
    try:
        yield devices
    finally:
        until.set()
        for thread in threads:
            thread.join()


@contextmanager
def worst(base: str, size: str, address: str, folder: Path) -> Iterator[Callable[[str], dict[str, int]]]:
    """The bad tenant: a function that tells it to go or to rest, and returns what it did so far."""
    command = [sys.executable, __file__, "--worst", base, "--size", size, "--address", address, "--folder", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        into, out = process.stdin, process.stdout

        def tell(word: str) -> dict[str, int]:
            into.write(f"{word}\n")
            into.flush()
            answer: dict[str, int] = json.loads(out.readline())
            return answer

        yield tell
        process.stdin.close()


def be_worst(base: str, size: str, address: str, folder: Path) -> None:
    """The bad tenant's process, at the lowest priority: what it takes from others is to be the host's time, not this machine's."""
    os.nice(19)
    tenant = Worst(base, SIZES[size], address, folder, WORST)
    for line in sys.stdin:
        tenant.start() if line == "go\n" else tenant.stop()
        print(json.dumps(tenant.did), flush=True)


@dataclass
class Window:
    """A while with the bad tenant, or without."""

    begin: float
    end: float
    before: dict[str, float]
    after: dict[str, float]

    def of_the_honest(self, name: str) -> float:
        """How much a figure of the host grew for all tenants but the bad one."""
        keys = [key for key in self.after if key.startswith(f"atoll_host_tenant_{name} ") and not key.endswith(WORST)]
        return sum(self.after[key] - self.before.get(key, 0.0) for key in keys)


def window(running: Host, seconds: float) -> Window:
    """From now on, for so long."""
    before, begin = running.figures(), time.perf_counter()
    time.sleep(seconds)
    return Window(begin, time.perf_counter(), before, running.figures())


def summary(devices: list[Honest], windows: list[Window]) -> dict[str, Any]:
    """Steps that lie within the windows: time per token for the device, and of it what was the host's, computing and waiting for a turn."""
    steps = [[end - begin for begin, end in one.steps if any(w.begin <= begin and end <= w.end for w in windows)] for one in devices]
    flat, num_tokens = [seconds for each in steps for seconds in each], devices[0].num_tokens
    tokens = sum(w.of_the_honest("tokens_total") for w in windows)
    return {
        "steps": len(flat), "seconds_per_token": statistics.fmean(flat) / num_tokens,
        "seconds_per_token_slowest_device": max(statistics.fmean(each) for each in steps if each) / num_tokens,
        "step_seconds_median": statistics.median(flat), "step_seconds_largest": max(flat),
        "host_compute_seconds_per_token": sum(w.of_the_honest("compute_seconds_total") for w in windows) / tokens,
        "host_wait_seconds_per_token": sum(w.of_the_honest("wait_seconds_total") for w in windows) / tokens,
    }  # fmt: skip


def open_and_close(base: str, size: Size, running: Host, folder: Path, name: str, count: int) -> list[tuple[int, int, int]]:
    """Sessions one after the other; the host after every tenth of them."""
    side, found = side_of(base, size, access(running.address, folder, name)), []
    for number in range(count):
        side.client.connect(Given({}, {}, False)).stream.transport.close()
        if (number + 1) % max(1, count // 10) == 0:
            time.sleep(1.0)  # The last ones end.
            found.append(running.now())
    side.close()
    return found


def measure(given: argparse.Namespace, base: str, folder: Path) -> dict[str, Any]:
    """All phases against one host."""
    size, seconds, found = SIZES[given.size], 60.0 * given.minutes / given.cycles, dict[str, Any]()
    names = [f"tenant{number:02d}" for number in range(given.devices - 1)]
    with host(base, size, folder, [*names, WORST]) as running:
        with training(base, size, running.address, folder, names[:1], 1.0) as one:
            wait_for_steps(one, 1)
            found["alone"] = summary(one, [window(running, seconds)])
        off, on = list[Window](), list[Window]()
        with worst(base, given.size, running.address, folder) as tell, training(
            base, size, running.address, folder, names, given.pause
        ) as devices:
            wait_for_steps(devices, 1)
            for _ in range(given.cycles):
                off.append(window(running, seconds / 3))
                tell("go")
                on.append(window(running, seconds))
                found["the worst did"] = tell("rest")
        found |= {"without the worst": summary(devices, off), "beside the worst": summary(devices, on)}
        found |= {"lost": sum(len(one.lost) for one in devices), "failed": [one.failed for one in devices if one.failed]}
        with training(base, size, running.address, folder, names, 0.0) as again:
            wait_for_steps(again, min(10, *(len(one.losses) for one in devices)))
        losses = [zip(old.losses, new.losses, strict=False) for old, new in zip(devices, again, strict=True)]
        found["losses_bit_for_bit"] = all(a == b for pairs in losses for a, b in pairs)
        found["largest"] = dict(zip(HELD, map(max, zip(*running.samples, strict=True)), strict=True))
        held = open_and_close(base, size, running, folder, names[0], given.sessions)
        found["sessions"] = [dict(zip(HELD, one, strict=True)) for one in held]
    found["ratios"] = {
        f"{name}, beside the worst ÷ {other}": found["beside the worst"][name] / found[other][name]
        for name in ("seconds_per_token", "seconds_per_token_slowest_device") for other in ("without the worst", "alone")
    }  # fmt: skip
    return found


def wait_for_steps(devices: list[Honest], count: int) -> None:
    """Until each has made so many, or none is left that could."""
    while any(len(one.steps) < count and not one.failed for one in devices):
        time.sleep(0.1)


def main() -> None:
    """Measure and write; or be the bad tenant."""
    options = Options(__doc__)
    options.size("--devices", 16, 3, help="the bad one among them")
    options.size("--minutes", 5.0, 0.1, help="beside the bad one; a third of that without it")
    options.size("--cycles", 10, 1, help="how often the bad one comes")
    options.size("--sessions", 500, 20)
    options.size("--size", "15M", "tiny", choices=tuple(SIZES))
    options.size("--pause", 20.0, 0.1, help="mean seconds between two steps of a device")
    options.add_argument("--worst", help="be the bad tenant, against this base")
    options.add_argument("--address")
    options.add_argument("--folder", type=Path)
    given = options.parse()
    if given.worst is not None:
        be_worst(given.worst, given.size, given.address, given.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = "tiny" if given.size == "tiny" else str(task.model_folder("15M", Path(folder) / "base"))
        found = measure(given, base, Path(folder) / "tls")
    for name in ("alone", "without the worst", "beside the worst", "ratios"):
        print(f"{name:18}", {key: round(value, 6) if isinstance(value, float) else value for key, value in found[name].items()})
    print({key: found[key] for key in ("lost", "failed", "losses_bit_for_bit")})
    settings = {name: getattr(given, name) for name in ("devices", "minutes", "cycles", "sessions", "size", "pause")}
    results.write(given.out, "tenant_load", settings | {"goals": GOALS}, found)


if __name__ == "__main__":
    main()
