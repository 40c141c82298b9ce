"""Between the coordinator's relay and Flower's grid: what is asked is pushed, and every reply is brought back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from atoll.errors import ProtocolError
from atoll.federated.flower import Message
from atoll.fleet.links.frames import PROBLEM, Frame, packed, unpacked
from atoll.fleet.links.relay import Relay

_POLL_SECONDS = 0.3


class Carries(Protocol):
    """What of Flower's grid is needed."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Their numbers."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there."""


def carry(grid: Carries, relay: Relay) -> None:
    """Push what is due at the relay, and hand it every reply as it comes, until the relay is closed; whatever is open is asked anew first.

    Raises: what the grid raises where SuperLink is gone.
    """
    relay.ask_all_again()
    pending: dict[str, Frame] = {}
    while not relay.is_closed:
        for frame in relay.due(_POLL_SECONDS):
            message = Message(packed(frame.content), frame.node, frame.kind, group_id=frame.group)
            if message_id := next(iter(grid.push_messages([message])), None):
                pending[message_id] = frame.answered()  # Only who was asked is needed for the answer.
            else:  # Too large, or for a node that is not known yet: Flower raises nothing then.
                relay.reply(frame.answered(problem="SuperLink does not take the message", is_lost=True))
        for reply in grid.pull_messages(list(pending)) if pending else ():
            question = pending.pop(reply.metadata.reply_to_message_id, None)
            if question is not None:
                relay.reply(_answer(question, reply))


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
