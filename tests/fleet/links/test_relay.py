"""Every question is answered once, whatever gets lost between coordinator and edges."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atoll.federated.flower import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from atoll.federated.grid import EDGE_FAILED, EDGE_LEFT
from atoll.fleet.links import carrier
from atoll.fleet.links.frames import PROBLEM, Frame
from atoll.fleet.links.relay import FleetGrid, Relay

from tests.fleet.links.carrying import Answers, Carrying, FakeGrid

NODES = {11: "north", 2**63 + 5: "south", 7: "west"}
OFFLINE = Error(5, "the node is offline")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "_POLL_SECONDS", 0.02)


@pytest.fixture
def relay() -> Iterator[Relay]:
    found = Relay(ask_again=0.2, ask_lost=0.05)
    yield found
    found.close()


def question(node: int, text: str = "hello") -> Message:
    return Message(RecordDict({"question": ConfigRecord({"text": text})}), node, "train", group_id="1")


def echo(content: RecordDict, node: int, times: int) -> Answers:
    return [RecordDict({"answer": ConfigRecord({"text": content.config_records["question"]["text"], "node": str(node), "times": times})})]


def told(reply: Message) -> tuple[object, object]:
    """Who answered, and to what."""
    answer = reply.content.config_records["answer"]
    assert str(reply.metadata.src_node_id) == answer["node"]
    return NODES[reply.metadata.src_node_id], answer["text"]


def ask_all(relay: Relay, timeout: float | None = 20) -> Iterator[Message]:
    return iter(FleetGrid(relay, NODES).send_and_receive([question(node, name) for node, name in NODES.items()], timeout=timeout))


def waiting_files(relay: Relay) -> list[Path]:
    return list(Path(relay._folder.name).iterdir())


def test_every_node_is_asked_and_its_answer_is_its_own(relay: Relay) -> None:
    Carrying(relay, FakeGrid(echo))
    assert sorted(map(told, ask_all(relay))) == [(name, name) for name in sorted(NODES.values())]  # type: ignore[type-var]
    assert not waiting_files(relay)


def test_content_crosses_bit_for_bit_and_nodes_keep_their_order(relay: Relay) -> None:
    data = bytes(range(256)) * 5000

    def back(content: RecordDict, node: int, times: int) -> Answers:
        return [RecordDict({**content, "times": MetricRecord({"x": 0.1})})]

    Carrying(relay, FakeGrid(back))
    grid = FleetGrid(relay, NODES)
    assert list(grid.get_node_ids()) == list(NODES)
    sent = RecordDict({"arrays": ArrayRecord({"a": Array("bfloat16", (len(data) // 2,), "raw", data)})})
    (reply,) = grid.send_and_receive([grid.create_message(sent, "query", 7, "3")], timeout=20)
    assert reply.content.array_records["arrays"]["a"].data == data
    assert reply.content.metric_records["times"]["x"] == 0.1
    assert reply.metadata.message_type == "query"


def test_answers_come_as_they_are_there(relay: Relay) -> None:
    done = threading.Event()

    def one_waits(content: RecordDict, node: int, times: int) -> Answers:
        return echo(content, node, times) if node != 11 or done.is_set() else []

    Carrying(relay, FakeGrid(one_waits))
    replies = ask_all(relay)
    assert {told(next(replies))[0], told(next(replies))[0]} == {"south", "west"}
    assert len(waiting_files(relay)) == 1, "what was answered waits no more"
    done.set()
    assert told(next(replies))[0] == "north"
    assert not list(replies)


def test_answers_that_nobody_has_taken_wait_in_files(relay: Relay) -> None:
    Carrying(relay, FakeGrid(echo))
    replies = ask_all(relay)
    first = next(replies)
    until(lambda: not relay._open)
    assert [file.suffix for file in waiting_files(relay)] == [".answer"] * 2
    assert {told(first)[0], *(told(reply)[0] for reply in replies)} == set(NODES.values())
    assert not waiting_files(relay)


@pytest.mark.parametrize("lose", [[], [OFFLINE]])
def test_what_was_lost_is_asked_again(relay: Relay, lose: Answers) -> None:
    grid = FakeGrid(lambda content, node, times: lose if times < 3 else echo(content, node, times))
    Carrying(relay, grid)
    replies = list(ask_all(relay))
    assert {told(reply)[0] for reply in replies} == set(NODES.values())
    assert all(reply.content.config_records["answer"]["times"] >= 3 for reply in replies)  # type: ignore[operator]


def test_after_many_errors_one_more_loss_does_not_wait_long(relay: Relay) -> None:
    """An edge that was away for a while comes back, and its next answer is lost without a word."""

    def away(content: RecordDict, node: int, times: int) -> Answers:
        return [OFFLINE] if times < 8 else [] if times == 8 else echo(content, node, times)

    grid = FakeGrid(away)
    Carrying(relay, grid)
    (reply,) = FleetGrid(relay, NODES).send_and_receive([question(7)], timeout=20)
    assert reply.content.config_records["answer"]["times"] == 9
    assert grid.sent.count(7) == 9, "one plan for every question, however often it is lost"


def test_a_message_that_flower_does_not_take_is_tried_again(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, push = FakeGrid(echo), FakeGrid.push_messages
    refusals: list[list[str | None]] = [[], [None], [""]]
    monkeypatch.setattr(grid, "push_messages", lambda messages: refusals.pop() if refusals else push(grid, messages))
    thread = Carrying(relay, grid)
    assert [told(reply)[0] for reply in FleetGrid(relay, NODES).send_and_receive([question(7)], timeout=20)] == ["west"]
    relay.close()
    assert thread.ended()


def test_an_answer_counts_once(relay: Relay) -> None:
    """Two answers at once, and one more to the question that was asked again."""

    def twice(content: RecordDict, node: int, times: int) -> Answers:
        return echo(content, node, times) * 2

    grid = FakeGrid(twice)
    Carrying(relay, grid)
    for _ in range(2):
        assert len(list(ask_all(relay))) == len(NODES)
    relay.reply(Frame(1, 11, "train", "1", RecordDict()))
    relay.reply(Frame(999, 11, "train", "1", RecordDict()))
    assert not relay._answers


def test_what_an_edge_says_went_wrong_comes_as_its_error(relay: Relay) -> None:
    Carrying(relay, FakeGrid(lambda *_: [RecordDict({PROBLEM: ConfigRecord({"page": "error A403: other sizes"})})]))
    for reply in ask_all(relay):
        assert (reply.error.code, reply.error.reason) == (EDGE_FAILED, "error A403: other sizes")


def test_an_answer_that_atoll_did_not_write_ends_neither_the_carrying_nor_the_question(relay: Relay) -> None:
    grid = FakeGrid(echo)
    push = grid.push_messages

    def foreign(messages: list[Message]) -> object:
        ids = push(messages)
        if messages[0].metadata.dst_node_id == 7:
            (one,) = ids
            grid._here[str(one)] = [Message(RecordDict({"other": ConfigRecord({"a": 1})}), reply_to=messages[0])]
        return ids

    grid.push_messages = foreign  # type: ignore[method-assign,assignment]
    thread = Carrying(relay, grid)
    replies = {NODES[reply.metadata.src_node_id]: reply for reply in ask_all(relay)}
    assert "did not write" in replies["west"].error.reason
    assert told(replies["north"]) == ("north", "north")
    relay.close()
    assert thread.ended()


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a": {"arrays": {"x": ["u", [1], "r", 9223372036854775808]}}}\n', bytes(2**23)])
def test_an_answer_that_cannot_be_read_is_an_answer_and_nobody_is_waited_for(relay: Relay, data: bytes) -> None:
    """JSON that is too deep, a length that is none, and more bytes than the question allows: the node is asked once."""
    grid = FakeGrid(echo)
    push = grid.push_messages

    def foreign(messages: list[Message]) -> object:
        ids = push(messages)
        if messages[0].metadata.dst_node_id == 7:
            (one,) = ids
            pack = ArrayRecord({"atoll.records": Array("uint8", (len(data),), "atoll.records", data)})
            grid._here[str(one)] = [Message(RecordDict({"atoll.records": pack}), reply_to=messages[0])]
        return ids

    grid.push_messages = foreign  # type: ignore[method-assign,assignment]
    Carrying(relay, grid)
    replies = {NODES[reply.metadata.src_node_id]: reply for reply in ask_all(relay, timeout=None)}
    assert "W802" in replies["west"].error.reason
    assert ("longer than it may be" in replies["west"].error.reason) == (len(data) == 2**23)
    assert told(replies["north"]) == ("north", "north")
    assert grid.sent.count(7) == 1


def test_an_answer_may_be_as_long_as_its_question_and_some_more(relay: Relay) -> None:
    def larger(content: RecordDict, node: int, times: int) -> Answers:
        data = content.array_records["a"]["x"].data
        return [RecordDict({"a": ArrayRecord({"x": Array("uint8", (len(data),), "x", data)}), "more": ConfigRecord({"text": "x" * 2**20})})]

    Carrying(relay, FakeGrid(larger))
    content = RecordDict({"a": ArrayRecord({"x": Array("uint8", (2**23,), "x", bytes(2**23))})})
    (reply,) = FleetGrid(relay, NODES).send_and_receive([Message(content, 7, "train", group_id="1")], timeout=20)
    assert set(reply.content) == {"a", "more"}


def test_when_carrying_breaks_the_next_one_gets_all_that_is_open(relay: Relay) -> None:
    silent = FakeGrid(lambda content, node, times: echo(content, node, times) if node == 7 else [])
    first = Carrying(relay, silent)
    replies = ask_all(relay)
    assert told(next(replies))[0] == "west"
    silent.is_broken = True
    assert first.ended()
    grid = FakeGrid(echo)
    Carrying(relay, grid)
    assert {told(reply)[0] for reply in replies} == {"north", "south"}
    assert 7 not in grid.sent, "it has answered"


def test_after_the_timeout_what_is_open_is_let_go_and_late_answers_do_not_count(relay: Relay) -> None:
    grid = FakeGrid(lambda content, node, times: echo(content, node, times) if node == 7 else [])
    Carrying(relay, grid)
    replies = ask_all(relay, timeout=1.0)
    assert [told(reply)[0] for reply in replies] == ["west"]
    assert not waiting_files(relay)
    relay.reply(Frame(1, 11, "train", "1", RecordDict()))
    sent = len(grid.sent)
    (reply,) = FleetGrid(relay, NODES).send_and_receive([question(7, "next")], timeout=20)
    assert told(reply) == ("west", "next")
    assert grid.sent[sent:] == [7], "nobody else is asked any more"


def test_what_is_not_taken_is_let_go(relay: Relay) -> None:
    """Whoever counts answers failed meanwhile."""
    Carrying(relay, FakeGrid(lambda content, node, times: echo(content, node, times) if node != 11 else []))
    replies = FleetGrid(relay, NODES).send_and_receive([question(node) for node in NODES], timeout=20)
    next(iter(replies))
    replies.close()  # type: ignore[attr-defined]
    assert not waiting_files(relay)
    assert not relay._open
    assert not relay._answers


def test_pulling_takes_what_is_there_and_leaves_the_rest_asked(relay: Relay) -> None:
    done = threading.Event()
    Carrying(relay, FakeGrid(lambda content, node, times: echo(content, node, times) if node == 7 or done.is_set() else []))
    grid = FleetGrid(relay, NODES)
    ids = list(grid.push_messages([question(node, name) for node, name in NODES.items()]))
    found: list[Message] = []
    until(lambda: bool(found.extend(grid.pull_messages(ids)) or found))
    assert [told(reply)[0] for reply in found] == ["west"]
    done.set()
    until(lambda: len(found.extend(grid.pull_messages(ids)) or found) == len(NODES))  # type: ignore[arg-type]
    assert {told(reply)[0] for reply in found} == set(NODES.values())


def outcome(reply: Message) -> tuple[str, int]:
    """Who answered, and the code of the error, 0 where there is none."""
    return NODES[reply.metadata.src_node_id], reply.error.code if reply.has_error() else 0


def test_nobody_waits_for_a_node_that_left_where_enough_others_may_answer(relay: Relay) -> None:
    """And whoever left is waited for where they are too few, until the timeout."""
    south = 2**63 + 5
    Carrying(relay, FakeGrid(lambda content, node, times: echo(content, node, times) if node == 11 else [OFFLINE]))
    relay.are_away([south], time.monotonic())
    grid, questions = FleetGrid(relay, NODES, 2), [question(node) for node in NODES]
    found = iter(grid.send_and_receive(questions, timeout=None))
    assert sorted(outcome(next(found)) for _ in range(2)) == [("north", 0), ("south", EDGE_LEFT)]
    del found  # West is asked no more.
    relay.are_away([south, 7], time.monotonic())
    assert [outcome(reply) for reply in FleetGrid(relay, NODES, 2).send_and_receive(questions, timeout=0.5)] == [("north", 0)]
    assert sorted(outcome(reply) for reply in FleetGrid(relay, NODES, 1).send_and_receive(questions, timeout=None)) == [
        ("north", 0), ("south", EDGE_LEFT), ("west", EDGE_LEFT)
    ]  # fmt: skip
    assert [outcome(reply) for reply in FleetGrid(relay, NODES).send_and_receive(questions, timeout=0.5)] == [("north", 0)]
    assert not waiting_files(relay)


def test_a_node_that_leaves_while_it_is_waited_for_and_one_that_is_there_again(relay: Relay) -> None:
    before = time.monotonic()
    grid = FakeGrid(lambda content, node, times: echo(content, node, times) if node == 11 else [OFFLINE])
    Carrying(relay, grid)
    found = iter(FleetGrid(relay, NODES, 1).send_and_receive([question(node) for node in (11, 7)], timeout=None))
    assert outcome(next(found)) == ("north", 0)
    relay.are_away([7, 11], before)  # Of north this was seen before it answered.
    assert outcome(next(found)) == ("west", EDGE_LEFT)
    relay.are_away([], time.monotonic())
    (reply,) = FleetGrid(relay, NODES, 1).send_and_receive([question(11)], timeout=20)
    assert outcome(reply) == ("north", 0)


def test_closing_ends_the_carrying_and_leaves_no_file() -> None:
    relay, grid = Relay(), FakeGrid(lambda *_: [])
    thread = Carrying(relay, grid)
    relay.ask(question(7))
    folder = Path(relay._folder.name)
    assert folder.stat().st_mode & 0o077 == 0
    until(lambda: bool(grid.sent))
    relay.close()
    relay.close()
    assert thread.ended()
    relay.reply(Frame(1, 7, "train", "1", RecordDict()))
    assert not folder.exists()


def until(check: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if check():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to that")
