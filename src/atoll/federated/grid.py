"""Flower's Grid inside this process: one message after the other to the client apps of this run, no Ray, no start-up time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from atoll.errors import AtollError, PartError
from atoll.federated.flower import ClientApp, Context, Error, Grid, Message, RecordDict, Run, assume_identity

COORDINATOR_NODE = 0
EDGE_FAILED = 1
"""Flower error code of a reply from an edge whose app raised."""
EDGE_LEFT = 2
"""Of one from an edge that said goodbye."""


class CoordinatorGrid(Grid):
    """What grids of a coordinator that is no Flower app have in common: who speaks, and in which run."""

    def __init__(self) -> None:
        self._run = Run.create_empty(1)
        assume_identity(self._run.run_id, COORDINATOR_NODE)

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message from the coordinator to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class InProcessGrid(CoordinatorGrid):
    """One app for all nodes, and a Context for each; a message is handled when its reply is asked for.

    So memory does not grow with nodes, if their contexts are not held in it (see EdgeStates).
    """

    def __init__(self, app: ClientApp, nodes: MutableMapping[int, Context]) -> None:
        super().__init__()
        self._app, self._nodes = app, nodes
        self._pushed: dict[str, Message] = {}
        self._num_messages = 0

    def get_node_ids(self) -> Iterable[int]:
        """All nodes of the run, in the order they were given."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; they are handled by `pull_messages`."""
        return [self._accept(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the messages and return the replies."""
        return [self._handle(self._pushed.pop(message_id)) for message_id in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Handle the messages one by one as the replies are taken; none is started after the timeout."""
        return self._replies(messages, None if timeout is None else time.monotonic() + timeout)

    def _replies(self, messages: Iterable[Message], deadline: float | None) -> Iterator[Message]:
        for message in messages:
            if deadline is not None and time.monotonic() > deadline:
                return
            yield self._handle(self._pushed.pop(self._accept(message)))

    def _accept(self, message: Message) -> str:
        self._num_messages += 1
        message_id = f"message-{self._num_messages}"
        self._pushed[message_id] = numbered(message, message_id)
        return message_id

    def _handle(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = self._nodes[node]
        try:
            reply = self._app(message, context)
        except PartError:  # Code of whoever runs this process, which fails in it: no edge's own affair.
            raise
        except AtollError as problem:
            # What an edge did wrong is its own affair: the round goes on without it, as it would across machines.
            return Message(Error(EDGE_FAILED, problem.page()), reply_to=message)
        self._nodes[node] = context
        return reply


def numbered(message: Message, message_id: str) -> Message:
    """The message with a number, which an answer to it has to name."""
    # Flower's link would number the message; its own setter is private.
    metadata: Any = message.metadata
    metadata.__dict__["_message_id"] = message_id
    return message


def sent_by(message: Message, run_id: int, node: int) -> Message:
    """The message as one of this run and from this node, whoever this process is meanwhile."""
    metadata: Any = message.metadata
    metadata.__dict__["_run_id"], metadata.__dict__["_src_node_id"] = run_id, node
    return message
