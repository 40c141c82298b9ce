"""Temporary folders go when they are done with, and when a process is told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.scratch import scratch_folder

WAITS = """
import signal, sys, threading
from pathlib import Path
{made}
print(folder, flush=True)
sys.stdin.read()
"""
MADE = {
    "a folder": "from atoll.scratch import scratch_folder\none = scratch_folder('atoll-')\nfolder = one.name",
    "a round's updates": "from atoll.federated.aggregation.spool import Spool\none = Spool()\nfolder = one._folder.name",
    "edges' states": 'from atoll.federated.store import EdgeStates\none = EdgeStates({1: "north"})\nfolder = one._folder\none[1] = one[1]',
    "questions of a fleet": "from atoll.fleet.links.relay import Relay\none = Relay()\nfolder = one._folder.name",
}


def started(made: str, tmp: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(made=made)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp)},
    )  # fmt: skip
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("what", MADE)
def test_it_is_removed_when_the_process_is_told_to_end(tmp_path: Path, what: str) -> None:
    process, folder = started(MADE[what], tmp_path)
    assert folder.is_dir()
    assert folder.parent == tmp_path
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM, "who waits for it is told what ended it"
    assert not folder.exists()


def test_who_ends_in_a_way_of_their_own_does(tmp_path: Path) -> None:
    own = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    process, folder = started(own + "from atoll.scratch import scratch_folder\none = scratch_folder('atoll-')\nfolder = one.name", tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 7
    assert not folder.exists()


def test_it_is_this_users_alone_and_a_context(tmp_path: Path) -> None:
    with scratch_folder(".stage-", tmp_path) as folder:
        assert Path(folder).parent == tmp_path
        assert Path(folder).stat().st_mode & 0o077 == 0
    assert not list(tmp_path.iterdir())
