"""What a fleet's ServerApp does: push what the coordinator streams, and bring it every reply."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc

from atoll.errors import ProtocolError
from atoll.federated.flower import Grid, Message
from atoll.fleet.links.frames import PROBLEM, Frame, packed, unpacked
from atoll.fleet.links.sockets import LocalClient

_POLL_SECONDS = 0.3


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
        content = unpacked(reply.content, frame.most_bytes)
    except ProtocolError as problem:  # Asked again, the edge would say the same again.
        return frame.answered(problem=problem.page())
    if PROBLEM in content.config_records:
        return frame.answered(problem=str(content.config_records[PROBLEM].get("page")))
    return frame.answered(content)
