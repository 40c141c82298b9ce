"""Processes killed with signal 9: a real command line, at instants that nobody chose for convenience."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import atoll

from tests.jobs.conftest import Workplace
from tests.jobs.test_resume import outcome

EDGES: dict[str, dict[str, object]] = {"north": {}, "south": {}}
CHOOSES: dict[str, dict[str, object]] = {
    "run": {"rounds": 4}, "train": {"local_steps": 6, "optimizer_state": "keep", "schedule": "cosine"},
    "select": {"policy": "kill-and-revive", "every": 7, "observe_steps": 2, "keep": 0.5},
}  # fmt: skip
NUM_KILLS = 3


def test_killed_three_times_a_run_comes_to_the_same_bits(place: Workplace) -> None:
    config = place.config(EDGES, CHOOSES)
    whole, run = place.folder / "whole", place.folder / "run"
    atoll.train(config, out=whole)
    num_lines, draw = num_lines_of(whole), random.Random(7)
    command = ["train", str(config), "--out", str(run)]
    for _ in range(NUM_KILLS):
        killed_at(command, run, num_lines_of(run) + draw.randint(1, num_lines // 2))
        command = ["resume", str(run)]
    done = subprocess.run([sys.executable, "-m", "atoll", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " -m atoll generate" in done.stdout
    assert outcome(run) == outcome(whole)


def num_lines_of(run: Path) -> int:
    """Of its event log."""
    path = run / "events.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_at(command: list[str], run: Path, num_lines: int) -> None:
    """Run a command until the log has so many lines, and kill it at once."""
    process = subprocess.Popen([sys.executable, "-m", "atoll", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while num_lines_of(run) < num_lines and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, told = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), told.decode()
