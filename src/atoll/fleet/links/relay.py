"""The coordinator's grid in a fleet: messages go to Flower's ServerApp, which another process runs and which may be lost and come again.

What was asked waits in files, and so do answers, so that memory does not grow with edges. What gets no answer is asked again. An answer
counts once: whichever comes first.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from atoll.federated.flower import Error, Message, RecordDict
from atoll.federated.grid import EDGE_FAILED, CoordinatorGrid, numbered
from atoll.federated.payload import num_bytes
from atoll.fleet.links.frames import ANSWER_BYTES, Frame, page_of
from atoll.fleet.links.sockets import RELAY, LocalServer
from atoll.scratch import scratch_folder

ASK_AGAIN_SECONDS = 10.0
"""After so long without an answer a question is asked again, and then after twice as long."""
LOST_SECONDS = 2.0
"""So long a question waits that was lost on the way."""


@dataclass(slots=True)
class _Open:
    """A question without an answer."""

    path: Path
    message: Message
    """Without its content."""
    due: float = 0.0
    """When to ask it next; of the heap's entries for it, the one with this time holds."""
    wait: float = 0.0
    """Until it is asked once more after that, in seconds."""


class Relay:
    """Where ServerApps of a fleet come for messages and bring answers. The last one that came is the one that counts."""

    def __init__(
        self, on_lost: Callable[[], None] = lambda: None, *, ask_again: float = ASK_AGAIN_SECONDS, ask_lost: float = LOST_SECONDS
    ) -> None:
        self._on_lost, self._ask_again, self._ask_lost = on_lost, ask_again, ask_lost
        self._folder = scratch_folder("atoll-asked-")
        self._open: dict[int, _Open] = {}
        self._due: list[tuple[float, int]] = []
        """When to ask what, the earliest first."""
        self._changed = threading.Condition()
        self._answers: dict[int, _Open] = {}
        """Questions with answers that nobody has taken yet, in the order these came."""
        self._number, self._epoch, self._closed, self._served = 0, 0, False, False
        self._server = LocalServer(RELAY, {"Reply": self._reply}, {"Messages": self._messages})

    @property
    def address(self) -> str:
        """Of the socket."""
        return self._server.address

    @property
    def is_served(self) -> bool:
        """Whether the last ServerApp has come, and is here."""
        return self._served

    def next_epoch(self) -> int:
        """The number that the next ServerApp has to show; those before it get no more messages."""
        with self._changed:
            self._epoch += 1
            self._served = False
            self._changed.notify_all()
            return self._epoch

    def ask(self, message: Message) -> int:
        """Have a message delivered; its number."""
        with self._changed:
            self._number += 1
            number, metadata = self._number, message.metadata
            path = Path(self._folder.name) / f"{number}.frame"
            most = num_bytes(message.content) + ANSWER_BYTES
            question = Frame(number, metadata.dst_node_id, metadata.message_type, metadata.group_id, message.content, most_bytes=most)
            path.write_bytes(question.to_bytes())
            # The answer needs to know who was asked; the content lies in the file.
            bare = numbered(Message(RecordDict(), metadata.dst_node_id, metadata.message_type, group_id=metadata.group_id), str(number))
            self._open[number] = _Open(path, bare)
            self._plan(number, 0.0)
            return number

    def answers(self, numbers: Iterable[int], deadline: float | None) -> Iterator[Message]:
        """The answers to these questions as they come, until the deadline."""
        left = set(numbers)
        while left:
            with self._changed:
                while not (here := [number for number in self._answers if number in left]):
                    # In slices, because a wait without end cannot be interrupted by the user.
                    wait = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
                    if wait <= 0:
                        return
                    self._changed.wait(wait)
                asked = self._answers.pop(here[0])
            left.discard(here[0])
            frame = Frame.from_bytes(asked.path.read_bytes())
            asked.path.unlink()
            yield Message(frame.content if frame.problem is None else Error(EDGE_FAILED, page_of(frame.problem)), reply_to=asked.message)

    def let_go(self, numbers: Iterable[int]) -> None:
        """Ask these no more; what answers them from now on, or was not taken, does not count."""
        with self._changed:
            for number in numbers:
                for asked in (self._open.pop(number, None), self._answers.pop(number, None)):
                    if asked is not None:
                        asked.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let the ServerApp end; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.close()
        self._folder.cleanup()

    def _reply(self, data: bytes) -> bytes:
        frame = Frame.from_bytes(data)
        with self._changed:
            asked = self._open.get(frame.number)
            if asked is not None and frame.is_lost:
                self._plan(frame.number, self._ask_lost)
            elif asked is not None:
                # In place of the question, in one step: it may be read at this moment.
                answer = asked.path.with_suffix(".answer")
                answer.write_bytes(data)
                asked.path.unlink()
                self._answers[frame.number] = replace(self._open.pop(frame.number), path=answer)
                self._changed.notify_all()
        return b""

    def _plan(self, number: int, seconds: float) -> None:
        """Ask after so long, whatever was planned before; from there on with patience, as at first."""
        asked = self._open[number]
        asked.due, asked.wait = time.monotonic() + seconds, self._ask_again
        heapq.heappush(self._due, (asked.due, number))
        self._changed.notify_all()

    def _messages(self, shown: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """What is due, as long as this ServerApp is the last one; a new one is told all that is open."""
        epoch = int(shown)
        with self._changed:
            if epoch != self._epoch:
                return
            self._served = True
            for waiting in sorted(self._open):
                self._plan(waiting, 0.0)
        if not context.add_callback(lambda: self._ended(epoch)):
            self._ended(epoch)  # It has gone already, and nobody is called any more.
        while (number := self._next_due(epoch, context)) is not None:
            try:
                yield (Path(self._folder.name) / f"{number}.frame").read_bytes()
            except FileNotFoundError:
                continue  # Answered since.

    def _ended(self, epoch: int) -> None:
        with self._changed:
            lost = epoch == self._epoch and not self._closed
            self._served = self._served and not lost
            self._changed.notify_all()
        if lost:
            self._on_lost()

    def _next_due(self, epoch: int, context: grpc.ServicerContext) -> int | None:
        with self._changed:
            while epoch == self._epoch and not self._closed and context.is_active():
                now = time.monotonic()
                while self._due and not self._holds(*self._due[0]):
                    heapq.heappop(self._due)
                if self._due and self._due[0][0] <= now:
                    _, number = heapq.heappop(self._due)
                    asked = self._open[number]
                    asked.due = now + asked.wait
                    heapq.heappush(self._due, (asked.due, number))
                    asked.wait *= 2
                    return number
                self._changed.wait(self._due[0][0] - now if self._due else 1.0)
            return None

    def _holds(self, due: float, number: int) -> bool:
        return number in self._open and self._open[number].due == due


class FleetGrid(CoordinatorGrid):
    """Flower's Grid over a relay, for some of a fleet's nodes."""

    def __init__(self, relay: Relay, nodes: Mapping[int, str]) -> None:
        super().__init__()
        self._relay, self._nodes = relay, dict(nodes)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, in the order they were given."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have messages delivered; their numbers."""
        return [str(self._relay.ask(message)) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that are there by now."""
        return list(self._relay.answers(map(int, message_ids), time.monotonic()))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Ask all nodes, and give their answers as they come; after the timeout, or once nobody takes them, no more."""
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._answered([self._relay.ask(message) for message in messages], deadline)

    def _answered(self, numbers: Sequence[int], deadline: float | None) -> Iterator[Message]:
        try:
            yield from self._relay.answers(numbers, deadline)
        finally:
            self._relay.let_go(numbers)
