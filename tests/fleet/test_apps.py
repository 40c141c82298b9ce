"""What Flower's short-lived processes do: carry, and say so where nobody is there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grpc
import pytest

from atoll.errors import ProtocolError
from atoll.federated.flower import ConfigRecord, Context, Error, Message, RecordDict, assume_identity
from atoll.federated.grid import numbered
from atoll.fleet import join
from atoll.fleet.apps import client
from atoll.fleet.links import carrier
from atoll.fleet.links.carrier import carry
from atoll.fleet.links.frames import PROBLEM, Frame, packed, unpacked
from atoll.fleet.links.sockets import RESIDENT, LocalServer

CONTENT = RecordDict({"question": ConfigRecord({"text": "ü"})})


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    assume_identity(1, 0)
    monkeypatch.setattr(carrier, "_POLL_SECONDS", 0.01)


def asked(kind: str, content: RecordDict | None = None, config: Mapping[str, str] = {}) -> Message:
    return client(message(kind, packed(CONTENT) if content is None else content), Context(1, 7, dict(config), RecordDict(), {}))


def message(kind: str, content: RecordDict) -> Message:
    return numbered(Message(content, 7, kind, group_id="3"), "flower-1")


@pytest.mark.parametrize("kind", ["train", "query", "query.capabilities"])
def test_a_message_goes_to_the_resident_and_its_answer_back(kind: str) -> None:
    def resident(data: bytes) -> bytes:
        question = Frame.from_bytes(data)
        assert (question.node, question.kind, question.group) == (7, kind, "3")
        return question.answered(question.content).to_bytes()

    server = LocalServer(RESIDENT, {"Answer": resident})
    reply = asked(kind, config={"resident": server.address})
    server.close()
    assert unpacked(reply.content).config_records["question"]["text"] == "ü"
    assert reply.metadata.reply_to_message_id == "flower-1"


def test_what_the_resident_says_went_wrong_crosses_as_an_answer() -> None:
    server = LocalServer(RESIDENT, {"Answer": lambda data: Frame.from_bytes(data).answered(problem="error D201").to_bytes()})
    reply = asked("train", config={"resident": server.address})
    server.close()
    assert not reply.has_error()
    assert unpacked(reply.content).config_records[PROBLEM]["page"] == "error D201"


def test_a_resident_that_is_gone_is_an_error_that_flower_reports() -> None:
    server = LocalServer(RESIDENT, {})
    server.close()
    with pytest.raises(grpc.RpcError):
        asked("train", config={"resident": server.address})


def test_a_message_of_another_version_is_answered() -> None:
    reply = asked("train", RecordDict({"other": ConfigRecord({"a": 1})}), config={"resident": "unix:/nowhere"})
    assert "did not write" in str(unpacked(reply.content).config_records[PROBLEM]["page"])


def test_without_a_resident_the_app_is_the_edge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def once(folder: Path, question: bytes) -> bytes:
        assert folder == tmp_path
        return Frame.from_bytes(question).answered(problem="error once").to_bytes()

    monkeypatch.setattr(join, "answer_once", once)
    assert unpacked(asked("train", config={"folder": str(tmp_path)}).content).config_records[PROBLEM]["page"] == "error once"


class Coordinator:
    """Streams frames, and keeps what it is told."""

    def __init__(self, frames: Sequence[Frame], num_answers: int, *, dies: bool = False) -> None:
        self._frames, self._num_answers, self._dies = frames, num_answers, dies
        self.answers: list[Frame] = []

    def stream(self, method: str, epoch: bytes) -> Iterator[bytes]:
        """The frames; it ends once all answers are there."""
        assert (method, epoch) == ("Messages", b"4")
        yield from (frame.to_bytes() for frame in self._frames)
        while len(self.answers) < self._num_answers:
            time.sleep(0.005)
        if self._dies:
            raise grpc.RpcError

    def ask(self, method: str, data: bytes, *, timeout: float) -> bytes:
        """An answer."""
        assert method == "Reply"
        self.answers.append(Frame.from_bytes(data))
        return b""


class Link:
    """SuperLink: answers each message as `replies` says for its node, all in one pull."""

    def __init__(self, replies: dict[int, list[RecordDict | Error]]) -> None:
        self._replies = replies
        self._sent: list[Message] = []

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        """Their numbers."""
        for one in messages:
            numbered(one, f"flower-{len(self._sent)}")
            self._sent.append(one)
        return [one.metadata.message_id for one in messages]

    def pull_messages(self, ids: Sequence[str]) -> list[Message]:
        """All replies that are there."""
        asked = [one for one in self._sent if one.metadata.message_id in ids]
        return [Message(reply, reply_to=one) for one in asked for reply in self._replies[one.metadata.dst_node_id]]


@pytest.mark.parametrize("dies", [False, True])
def test_flowers_errors_are_losses_and_edges_errors_are_answers(dies: bool) -> None:
    frames = [Frame(number, node, "train", "3", CONTENT) for number, node in enumerate((5, 6, 7, 8))]
    link = Link({
        5: [packed(CONTENT)] * 2, 6: [Error(3, "node unavailable")], 7: [packed(RecordDict({PROBLEM: ConfigRecord({"page": "full"})}))],
        8: [RecordDict({"other": ConfigRecord({"a": 1})})],
    })  # fmt: skip
    coordinator = Coordinator(frames, 4, dies=dies)
    carry(link, coordinator, b"4")  # type: ignore[arg-type]
    first, second, third, fourth = sorted(coordinator.answers, key=lambda answer: answer.number)
    assert first.content.config_records["question"]["text"] == "ü"
    assert (first.problem, first.is_lost) == (None, False)
    assert (second.problem, second.is_lost) == ("node unavailable", True)
    assert (third.problem, third.is_lost) == ("full", False)
    assert fourth.problem is not None
    assert not fourth.is_lost


def test_a_superlink_that_is_gone_ends_the_serverapp() -> None:
    class Gone(Link):
        def push_messages(self, messages: Sequence[Message]) -> list[str]:
            raise ConnectionError("refused")

    with pytest.raises(ConnectionError):
        carry(Gone({}), Coordinator([Frame(1, 5, "train", "3", CONTENT)], 0), b"4")  # type: ignore[arg-type]


def test_a_problem_without_a_page_is_still_a_problem() -> None:
    frame = Frame(1, 7, "train", "3", RecordDict())
    reply = Message(packed(RecordDict({PROBLEM: ConfigRecord({})})), reply_to=message("train", RecordDict()))
    assert carrier._answer(frame, reply).problem is not None
    with pytest.raises(ProtocolError):
        unpacked(RecordDict())
