"""Messages carried in a thread, on a grid that answers from a function; either can be let die."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from atoll.federated.flower import Error, Message, RecordDict
from atoll.federated.grid import numbered
from atoll.fleet.links.carrier import carry
from atoll.fleet.links.frames import packed, unpacked
from atoll.fleet.links.relay import Relay

Answers = Sequence[RecordDict | Error]


class FakeGrid:
    """Flower's grid between the relay and edges: `answers` says what comes of a message's content, node and how often it was sent."""

    def __init__(self, answers: Callable[[RecordDict, int, int], Answers]) -> None:
        self._answers = answers
        self._here: dict[str, list[Message]] = {}
        self.sent: list[int] = []
        """The nodes of all messages."""
        self.is_broken = False

    def push_messages(self, messages: Sequence[Message]) -> Sequence[str | None]:
        """As Flower's."""
        self._check()
        ids = list[str | None]()
        for message in messages:
            node, number = message.metadata.dst_node_id, f"flower-{len(self.sent)}"
            numbered(message, number)
            self.sent.append(node)
            found = self._answers(unpacked(message.content), node, self.sent.count(node))
            self._here[number] = [Message(one if isinstance(one, Error) else packed(one), reply_to=message) for one in found]
            ids.append(number)
        return ids

    def pull_messages(self, ids: Sequence[str]) -> Sequence[Message]:
        """As Flower's; what comes twice comes at once."""
        self._check()
        return [reply for number in ids for reply in self._here.pop(number, [])]

    def _check(self) -> None:
        if self.is_broken:
            raise ConnectionError("SuperLink is gone")


class Carrying:
    """Carries for a relay until this ends, or the grid breaks."""

    def __init__(self, relay: Relay, grid: FakeGrid) -> None:
        self._relay, self._grid = relay, grid
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(ConnectionError):
            carry(self._grid, self._relay)  # type: ignore[arg-type]

    def ended(self) -> bool:
        """Whether it ends by itself."""
        self._thread.join(10)
        return not self._thread.is_alive()
