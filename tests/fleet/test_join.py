"""An edge's long-lived process, with a SuperNode that is no Flower."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.errors import ConflictError, DataFileError, FleetFolderError, ResumeError
from atoll.federated.flower import RecordDict
from atoll.fleet import join as join_module
from atoll.fleet.init import init
from atoll.fleet.join import answer_once, join
from atoll.fleet.links.frames import Frame
from atoll.fleet.links.sockets import RESIDENT, LocalClient
from atoll.fleet.processes import free_port
from atoll.jobs.backends.fleet import CAPABILITIES, TEXT
from atoll.jobs.backends.worker import Capabilities

from tests.run_files import DEMO, write_run

ASKED = Frame(1, 7, f"query.{CAPABILITIES}", "0", RecordDict()).to_bytes()


@pytest.fixture
def north(tmp_path: Path) -> Path:
    init(write_run(tmp_path, {"data": {"train_rows": 10}}, over=DEMO), tmp_path / "fleet", f"127.0.0.1:{free_port()}")
    return tmp_path / "fleet" / "edges" / "north"


@pytest.fixture
def supernode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in place of flower-supernode."""

    def becomes(script: str) -> None:
        path = tmp_path / "supernode.sh"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(join_module, "command", lambda name: str(path))

    return becomes


class Joined:
    """An edge that has joined, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.stop, self._spoke = threading.Event(), threading.Condition()
        self._thread = threading.Thread(target=join, args=(folder, self._tell), kwargs={"stop": self.stop}, daemon=True)
        self._thread.start()

    def _tell(self, line: str) -> None:
        with self._spoke:
            self.said.append(line)
            self._spoke.notify_all()

    def heard(self, num_lines: int) -> list[str]:
        """What it has told, once it is so many lines."""
        with self._spoke:
            assert self._spoke.wait_for(lambda: len(self.said) >= num_lines, 60)
        return self.said

    def ended(self) -> bool:
        """Whether it ends when it is asked to."""
        self.stop.set()
        self._thread.join(60)
        return not self._thread.is_alive()


def test_an_edge_answers_its_supernode_until_it_is_stopped(north: Path, supernode: Callable[[str], None]) -> None:
    supernode(f'echo "$@" > {north}/arguments; exec sleep 600')
    edge = Joined(north)
    assert edge.heard(1)[0].startswith("north is ready for 127.0.0.1:")
    arguments = north / "arguments"
    pause = threading.Event()
    while not (arguments.is_file() and arguments.read_text().endswith("\n")):
        pause.wait(0.01)
    text = arguments.read_text()
    assert "--insecure" not in text
    assert f"--root-certificates {north}/ca.pem" in text
    address = text.partition('resident="')[2].partition('"')[0]
    with LocalClient(address, RESIDENT) as client:
        answer = Frame.from_bytes(client.ask("Answer", ASKED, timeout=60))
    capabilities = Capabilities.from_text(str(answer.content.config_records[CAPABILITIES][TEXT]))
    assert (capabilities.edge, capabilities.num_rows) == ("north", 5)
    with pytest.raises(ResumeError):
        join(north, edge.said.append, stop=threading.Event())
    assert edge.ended()
    assert not Path(address.removeprefix("unix:")).exists()
    assert len(edge.said) == 1
    assert (north / "flower").stat().st_mode & 0o077 == 0


def test_a_supernode_that_ends_is_told_and_started_again(north: Path, supernode: Callable[[str], None]) -> None:
    supernode("echo the node is not registered; exit 3")
    edge = Joined(north)
    first, second = edge.heard(3)[1:3]
    assert "status 3 (the node is not registered)" in first
    assert "again in 1 s" in first
    assert "again in 2 s" in second
    assert edge.ended()


def test_an_edge_answers_once_without_a_process_that_stays(north: Path) -> None:
    answer = Frame.from_bytes(answer_once(north, ASKED))
    assert Capabilities.from_text(str(answer.content.config_records[CAPABILITIES][TEXT])).edge == "north"
    assert Frame.from_bytes(answer_once(north, Frame(1, 7, "train", "1", RecordDict()).to_bytes())).problem is not None


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FleetFolderError):
        join(tmp_path / "empty", print, stop=threading.Event())
    assert not list((tmp_path / "empty").iterdir())


def test_a_config_without_this_edge_is_refused(north: Path) -> None:
    (north / "edge.json").write_text(json.dumps({**json.loads((north / "edge.json").read_text()), "name": "west"}))
    with pytest.raises(ConflictError, match="does not know this edge"):
        join(north, print, stop=threading.Event())


def test_rows_that_are_not_here_are_refused_before_anything_starts(north: Path, supernode: Callable[[str], None]) -> None:
    supernode("exit 9")
    with pytest.raises(DataFileError):
        join(north, print, overrides=['data.train="rows.csv"'], stop=threading.Event())
    assert not (north / "supernode.log").exists()
