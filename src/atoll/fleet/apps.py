"""The two Flower apps of a fleet. Flower starts a new process for every message, so that they hold nothing and load nothing heavy.

The ServerApp hands messages between SuperLink and the coordinator, the ClientApp between SuperNode and the edge's resident process; where
no resident is named, the ClientApp is the edge itself, for this one message.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc

from atoll.engines.federated.flower import ClientApp, ConfigRecord, Context, Grid, Message, RecordDict, ServerApp
from atoll.errors import ProtocolError
from atoll.fleet.links.frames import Frame, packed, unpacked
from atoll.fleet.links.sockets import LocalClient

RELAY, RESIDENT = "atoll.Relay", "atoll.Resident"
PROBLEM = "problem"
"""Key of what an edge says went wrong, in a reply: Flower's own errors are for what happened on the way."""
_POLL_SECONDS = 0.3

server = ServerApp()
client = ClientApp()


@server.main()
def relay(grid: Grid, context: Context) -> None:
    """Carry messages until the coordinator has no more; where none is named, be the coordinator."""
    settings = context.run_config
    if not settings["relay"]:
        from atoll.fleet.train import train_in_app  # Loads torch, which a carrier does not need.

        train_in_app(grid, Path(str(settings["config"])), Path(str(settings["out"])), resumes=bool(settings["resume"]))
        return
    with LocalClient(str(settings["relay"]), RELAY) as coordinator:
        carry(grid, coordinator, str(settings["epoch"]).encode())


def carry(grid: Grid, coordinator: LocalClient, epoch: bytes) -> None:
    """Push what the coordinator streams, and hand it every reply as it comes."""
    waiting: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read, args=(coordinator.stream("Messages", epoch), waiting), daemon=True).start()
    pending: dict[str, Frame] = {}
    ended = False
    while not ended:
        for data in _taken(waiting):
            if data is None:
                ended = True
                break
            frame = Frame.from_bytes(data)
            message = Message(packed(frame.content), frame.node, frame.kind, group_id=frame.group)
            message_id = next(iter(grid.push_messages([message])), None)
            if message_id is None:  # Too large, or for a node that is not known yet: Flower raises nothing then.
                _tell(coordinator, frame.answered(problem="SuperLink does not take the message", is_lost=True))
                continue
            # Only who asked is needed for the answer.
            pending[message_id] = frame.answered()
        for reply in grid.pull_messages(list(pending)) if pending else ():
            asked = pending.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:
                _tell(coordinator, _answer(asked, reply))


def _tell(coordinator: LocalClient, answer: Frame) -> None:
    coordinator.ask("Reply", answer.to_bytes(), timeout=60)


def _read(stream: Iterator[bytes], waiting: queue.Queue[bytes | None]) -> None:
    try:
        for data in stream:
            waiting.put(data)
    except grpc.RpcError:
        pass  # The coordinator is gone: another will start another run.
    waiting.put(None)


def _taken(waiting: queue.Queue[bytes | None]) -> Iterator[bytes | None]:
    try:
        yield waiting.get(timeout=_POLL_SECONDS)
        while True:
            yield waiting.get_nowait()
    except queue.Empty:
        return


def _answer(frame: Frame, reply: Message) -> Frame:
    if reply.has_error():
        return frame.answered(problem=reply.error.reason or f"code {reply.error.code}", is_lost=True)
    try:
        content = unpacked(reply.content)
    except ProtocolError as problem:  # Asked again, the edge would say the same again.
        return frame.answered(problem=problem.page())
    if PROBLEM in content.config_records:
        return frame.answered(problem=str(content.config_records[PROBLEM].get("page")))
    return frame.answered(content)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Have the edge train for a round."""
    return _of_the_edge(message, context)


@client.query()
def query(message: Message, context: Context) -> Message:
    """Have the edge score modules."""
    return _of_the_edge(message, context)


@client.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Have the edge say what it has."""
    return _of_the_edge(message, context)


def _of_the_edge(message: Message, context: Context) -> Message:
    metadata = message.metadata
    try:
        content = unpacked(message.content)
    except ProtocolError as problem:
        return Message(packed(_told(problem.page())), reply_to=message)
    question = Frame(0, metadata.dst_node_id, metadata.message_type, metadata.group_id, content).to_bytes()
    if "resident" in context.node_config:
        with LocalClient(str(context.node_config["resident"]), RESIDENT) as resident:
            answer = Frame.from_bytes(resident.ask("Answer", question))
    else:
        from atoll.fleet.join import answer_once  # Loads torch and the base, as every message does without a resident.

        answer = Frame.from_bytes(answer_once(Path(str(context.node_config["folder"])), question))
    return Message(packed(answer.content if answer.problem is None else _told(answer.problem)), reply_to=message)


def _told(page: str) -> RecordDict:
    return RecordDict({PROBLEM: ConfigRecord({"page": page})})
