"""Processes end with who started them, and what does not start or run is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atoll.errors import HostLostError
from atoll.fleet import processes
from atoll.fleet.processes import Child, free_port, until_ready

PYTHON = sys.executable
SLEEPS = "import time; print('ready', flush=True); time.sleep(600)"


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    started: list[Child] = []

    def start(script: str) -> Child:
        started.append(Child("it", [PYTHON, "-c", script], tmp_path / "logs" / "it.log"))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child may outlive its parent")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_when_its_parent_is_killed(tmp_path: Path, how: signal.Signals) -> None:
    script = (
        "import sys, time; from pathlib import Path; from atoll.fleet.processes import Child\n"
        f"child = Child('it', [sys.executable, '-c', {SLEEPS!r}], Path(sys.argv[1]))\n"
        "child.wait_for('ready', 60); print(child.pid, flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([PYTHON, "-c", script, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
    finally:
        parent.send_signal(how)
        parent.communicate()
    assert until_ready(lambda: not is_running(pid), 20)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child may outlive its parent")
def test_a_child_whose_parent_is_gone_already_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
    late = Child("it", [PYTHON, "-c", SLEEPS], tmp_path / "log")
    monkeypatch.undo()
    assert late._process.wait(20) == 1
    assert late.said() == ""


def test_what_a_child_says_is_waited_for_and_kept(child: Callable[[str], Child]) -> None:
    one = child(SLEEPS)
    one.wait_for("ready", 30)
    assert (one.status, one.said()) == (None, "ready\n")
    assert is_running(one.pid)


def test_what_an_earlier_child_said_in_the_same_log_is_not_heard(child: Callable[[str], Child]) -> None:
    first = child("print('ready')")
    first._process.wait(30)
    second = child("print('another'); raise SystemExit(3)")
    with pytest.raises(HostLostError) as raised:
        second.wait_for("ready", 30)
    assert raised.value.got == "it ended with status 3; another"
    assert second.log.read_text() == "ready\nanother\n"


def test_a_child_that_says_nothing_in_time_is_told(child: Callable[[str], Child]) -> None:
    with pytest.raises(HostLostError, match="does not start") as raised:
        child("import time; time.sleep(600)").wait_for("ready", 0.2)
    assert "nothing of it in 0.2 s" in raised.value.got
    assert raised.value.where.endswith("it.log")


def test_a_command_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostLostError, match="does not start"):
        Child("it", [str(tmp_path / "missing")], tmp_path / "log").wait_for("ready", 30)


def test_stopping_is_asked_for(child: Callable[[str], Child]) -> None:
    one = child(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    one.wait_for("ready", 30)
    one.stop()
    one.stop()
    assert (one.status, one.said()) == (0, "ready\nbye\n")


def test_who_does_not_stop_is_killed(child: Callable[[str], Child], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.2)
    one = child("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True); time.sleep(600)")
    one.wait_for("ready", 30)
    one.stop()
    assert one.status == -signal.SIGKILL


def test_a_port_that_was_given_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the system may offer it again at once."""
    offered = iter([("127.0.0.1", 40_001), ("127.0.0.1", 40_001), ("127.0.0.1", 40_002)])
    monkeypatch.setattr(processes, "_given", set())
    monkeypatch.setattr(processes.socket.socket, "getsockname", lambda _: next(offered))
    assert (free_port(), free_port()) == (40_001, 40_002)


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


def test_waiting_ends_when_it_is_so_or_time_is_up() -> None:
    begin = time.monotonic()
    assert until_ready(lambda: time.monotonic() > begin + 0.15, 30)
    assert not until_ready(lambda: False, 0.1)
