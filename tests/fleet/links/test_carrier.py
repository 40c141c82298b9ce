"""What comes back from Flower's grid: errors on the way are losses, and what an edge says is its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from atoll.errors import ProtocolError
from atoll.federated.flower import ConfigRecord, Error, Message, RecordDict, assume_identity
from atoll.federated.grid import numbered
from atoll.fleet.links import carrier
from atoll.fleet.links.carrier import carry
from atoll.fleet.links.frames import PROBLEM, Frame, packed, unpacked

CONTENT = RecordDict({"question": ConfigRecord({"text": "ü"})})


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    assume_identity(1, 0)
    monkeypatch.setattr(carrier, "_POLL_SECONDS", 0.01)


class Questions:
    """A relay that has these due at once, and closes when each has an answer."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames, self._num_answers = list(frames), len(frames)
        self.answers: list[Frame] = []

    @property
    def is_closed(self) -> bool:
        """Whether all are answered."""
        return len(self.answers) >= self._num_answers

    def ask_all_again(self) -> None:
        """They are due."""

    def due(self, seconds: float) -> Iterator[Frame]:
        """All of them, once."""
        while self._frames:
            yield self._frames.pop(0)

    def reply(self, frame: Frame) -> None:
        """An answer."""
        self.answers.append(frame)


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


def test_flowers_errors_are_losses_and_edges_errors_are_answers() -> None:
    link = Link({
        5: [packed(CONTENT)] * 2, 6: [Error(3, "node unavailable")], 7: [packed(RecordDict({PROBLEM: ConfigRecord({"page": "full"})}))],
        8: [RecordDict({"other": ConfigRecord({"a": 1})})],
    })  # fmt: skip
    relay = Questions([Frame(number, node, "train", "3", CONTENT) for number, node in enumerate((5, 6, 7, 8))])
    carry(link, relay)  # type: ignore[arg-type]
    first, second, third, fourth = sorted(relay.answers, key=lambda answer: answer.number)
    assert first.content.config_records["question"]["text"] == "ü"
    assert (first.problem, first.is_lost) == (None, False)
    assert (second.problem, second.is_lost) == ("node unavailable", True)
    assert (third.problem, third.is_lost) == ("full", False)
    assert fourth.problem is not None
    assert not fourth.is_lost


def test_a_superlink_that_is_gone_ends_the_carrying() -> None:
    class Gone(Link):
        def push_messages(self, messages: Sequence[Message]) -> list[str]:
            raise ConnectionError("refused")

    with pytest.raises(ConnectionError):
        carry(Gone({}), Questions([Frame(1, 5, "train", "3", CONTENT)]))  # type: ignore[arg-type]


def test_a_problem_without_a_page_is_still_a_problem() -> None:
    frame = Frame(1, 7, "train", "3", RecordDict())
    reply = Message(packed(RecordDict({PROBLEM: ConfigRecord({})})), reply_to=numbered(Message(RecordDict(), 7, "train"), "flower-1"))
    assert carrier._answer(frame, reply).problem is not None
    with pytest.raises(ProtocolError):
        unpacked(RecordDict())
