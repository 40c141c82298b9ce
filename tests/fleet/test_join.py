"""An edge's one process, with a coordinator that is no SuperLink."""

from __future__ import annotations

import json
import queue
import sys
import threading
from pathlib import Path
from typing import Self

import httpx
import pytest

from atoll.errors import ConflictError, DataFileError, FleetFolderError, PartError, ResumeError
from atoll.federated.flower import ConfigRecord, Message, RecordDict
from atoll.federated.grid import numbered
from atoll.fleet.check import check_fleet
from atoll.fleet.files import EdgeFolder
from atoll.fleet.init import init
from atoll.fleet.join import answer_once, join
from atoll.fleet.links import node
from atoll.fleet.links.frames import Frame, packed, unpacked
from atoll.fleet.processes import free_port
from atoll.jobs.backends.fleet import CAPABILITIES, FINISHED, ROUNDS, TEXT
from atoll.jobs.backends.worker import Capabilities

from tests.run_files import DEMO, write_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ASKED = Frame(1, 7, f"query.{CAPABILITIES}", "0", RecordDict())


@pytest.fixture
def north(tmp_path: Path) -> Path:
    init(write_run(tmp_path, {"data": {"train_rows": 10}}, over=DEMO), tmp_path / "fleet", f"127.0.0.1:{free_port()}")
    return tmp_path / "fleet" / "edges" / "north"


class Link:
    """A coordinator that asks once what the edge has."""

    replies: queue.SimpleQueue[Message]

    def __init__(self, address: str, http: httpx.Client, key: Path) -> None:
        self._asked = [numbered(Message(packed(ASKED.content), ASKED.node, ASKED.kind, group_id=ASKED.group), "flower-1")]
        http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def pull(self) -> Message | None:
        """The question."""
        return self._asked.pop() if self._asked else None

    def push(self, reply: Message, seconds: float) -> None:
        """The answer."""
        self.replies.put(reply)

    def say_goodbye(self) -> bool:
        """It is heard."""
        return True


class Joined:
    """An edge that has joined, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.stop = threading.Event()
        self._thread = threading.Thread(target=join, args=(folder, self.said.put), kwargs={"stop": self.stop}, daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        """Whether it ends when it is asked to."""
        self.stop.set()
        self._thread.join(60)
        return not self._thread.is_alive()


def test_an_edge_answers_its_coordinator_until_it_is_stopped(north: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Link, "replies", queue.SimpleQueue(), raising=False)
    monkeypatch.setattr(node, "EdgeLink", Link)
    edge = Joined(north)
    assert edge.said.get(timeout=60).startswith("north is ready for 127.0.0.1:")
    reply = Link.replies.get(timeout=60)
    capabilities = Capabilities.from_text(str(unpacked(reply.content).config_records[CAPABILITIES][TEXT]))
    assert (capabilities.edge, capabilities.num_rows) == ("north", 5)
    assert reply.metadata.reply_to_message_id == "flower-1"
    with pytest.raises(ResumeError):
        join(north, print, stop=threading.Event())
    assert edge.ended()
    assert edge.said.get_nowait() == "this edge leaves: the coordinator was told"
    assert edge.said.empty()


def test_an_edge_says_that_a_run_is_complete(north: Path) -> None:
    """To its owner, in its own words: nothing that a coordinator says is shown as it came."""
    for rounds, says in ((1, "the run is complete: 1 round;"), (16, "the run is complete: 16 rounds;"), ("\x1b[2J", "cannot follow")):
        content = RecordDict({FINISHED: ConfigRecord({ROUNDS: rounds})})
        answer = Frame.from_bytes(answer_once(north, Frame(1, 7, f"query.{FINISHED}", "0", content).to_bytes()))
        assert (answer.problem is None) is isinstance(rounds, int)
        last = (north / "events.jsonl").read_text().splitlines()[-1]
        assert says in last
        assert "\x1b" not in json.loads(last)["advice"]


def test_a_coordinator_that_is_not_there_is_told_once_and_called_again(north: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Nobody(Link):
        def __enter__(self) -> Self:
            calls.put("called")
            raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(node, "EdgeLink", Nobody)
    monkeypatch.setattr(node, "_SHORTEST_WAIT", 0.01)
    edge = Joined(north)
    for _ in range(3):
        calls.get(timeout=60)
    assert edge.ended()
    address = EdgeFolder(north).read().superlink
    told = [edge.said.get_nowait() for _ in range(edge.said.qsize())]
    assert told[1:] == [f"{address} cannot be reached: [Errno 111] Connection refused; it is tried again"]


def test_an_edge_answers_once_without_a_process_that_stays(north: Path) -> None:
    answer = Frame.from_bytes(answer_once(north, ASKED.to_bytes()))
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


def test_rows_that_are_not_here_are_refused_before_anybody_is_called(north: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "EdgeLink", None)
    with pytest.raises(DataFileError):
        join(north, print, overrides=['data.train="rows.csv"'], stop=threading.Event())


def test_a_part_that_is_not_built_in_is_wanted_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is named where a fleet's folders are written and where they are looked at; without it nobody starts."""
    for name in ("spread.py", "run.toml"):
        (tmp_path / name).write_text((EXAMPLES / "extend" / name).read_text().replace("equal_votes:EqualVotes", "exact-svd"))
    monkeypatch.delitem(sys.modules, "spread", raising=False)
    init(tmp_path / "run.toml", tmp_path / "fleet", f"127.0.0.1:{free_port()}")
    del sys.modules["spread"]  # Of the folder that it was read from; this process goes on as another machine.
    edge, part = tmp_path / "fleet" / "edges" / "pharmacy", "part spread:Spread (a program: copy it if you trust who wrote it)"
    assert (tmp_path / "fleet" / "README.md").read_text().count(f"- {part}: `spread.py`") == 3
    assert [check.status for check in check_fleet(edge).checks if check.name == part] == ["fail"]
    with pytest.raises(PartError, match="own folder only"):
        answer_once(edge, packed(ASKED.content))
    (edge / "spread.py").write_text((tmp_path / "spread.py").read_text())
    assert [check.status for check in check_fleet(edge).checks if check.name == part] == ["ok"]
