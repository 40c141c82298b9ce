"""A real process with streams as they may be, and with signals: what was asked for is done, said if it can be, and its status is right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.cli.surroundings import ToldToEnd, endable

RUN = '[data]\ntrain = "rows.csv"\neval = "rows.csv"\n[run]\nrounds = 1\n[train]\nlocal_steps = 1\n'
ATOLL = [sys.executable, "-m", "atoll"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.csv").write_text("prompt,completion\nfür wen →,b\nr,b\n", encoding="utf-8")
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """What bash says of the line, in which $A is `python -m atoll`."""
    env = {**os.environ, "A": " ".join(ATOLL), **environment}
    return subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=folder, env=env, capture_output=True)


@pytest.mark.parametrize(("line", "status", "out", "err"), [
    ("$A plan run.toml > /dev/full", 1, b"", b"standard output cannot be written: No space left on device"),
    ("$A train run.toml 2> /dev/full", 0, b"adapter: runs/run-0001/adapter", b""),
    ("$A train run.toml 2>&-", 0, b"adapter: runs/run-0001/adapter", b""),
    ("$A train run.toml 2>&- >&-", 0, b"", b""),
    ("$A plan run.toml <&- >&-", 0, b"", b""),
    ("$A train run.toml 2>&1 | true", 141, b"", b""),
    # Without the package's own folder on its path, python -m could not start there.
    ('mkdir gone; cd gone; rmdir ../gone; PYTHONSAFEPATH=1 $A plan ../run.toml', 2, b"", b"the current folder is not there any more"),
    ("$A plan run.toml --json | true", 141, b"", b""),
])  # fmt: skip
def test_streams_that_are_full_closed_or_not_read(line: str, status: int, out: bytes, err: bytes, folder: Path) -> None:
    done = shell(line, folder)
    assert (done.returncode, out in done.stdout, err in done.stderr) == (status, True, True), done
    assert b"Traceback" not in done.stderr
    assert b"X999" not in done.stderr
    if "train" in line and status == 0:
        assert json.loads((folder / "runs/run-0001/summary.json").read_text())["status"] == "complete"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_output_of_another_encoding(encoding: str, folder: Path) -> None:
    """Tables are drawn with what it has, JSON stays JSON, and a prompt that it cannot say is written as Python writes it."""
    done = shell("$A train run.toml && $A train run.toml --json", folder, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    text, _, document = done.stdout.decode(encoding).partition("next:")
    assert "loss (nats/token)" in text
    prompt, _, document = document.partition("\n")
    assert prompt.endswith("'f\u00fcr wen \u2192'" if encoding.startswith("utf") else prompt)
    assert json.loads(document)["status"] == "complete"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_told_to_end_saves_its_work_and_says_so(
    number: signal.Signals, atoll: Callable[..., object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    heard: list[object] = []

    def tells(event: object) -> None:
        heard.append(event)
        if type(event).__name__ == "CheckpointWritten":
            signal.raise_signal(number)

    monkeypatch.setattr("atoll.report.progress.Progress.__call__", lambda self, event: tells(event))
    before = signal.signal(number, signal.SIG_DFL)  # The tests themselves may run under nohup.
    try:
        done = atoll("train", "run.toml", "--set", "run.rounds=50")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    saved = "work saved in runs/run-0001, up to round-0001; go on with\n  atoll resume runs/run-0001\n"
    assert (done.status, done.out, done.err) == (128 + number, "", f"ended by {number.name}; {saved}")  # type: ignore[attr-defined]
    assert json.loads((folder / "runs/run-0001/summary.json").read_text())["status"] == "interrupted"


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with endable():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(ToldToEnd):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
