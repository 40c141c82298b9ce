"""The coordinator's grid in a fleet: messages go to whoever carries them to SuperLink, who may be lost and come again.

What was asked waits in files, and so do answers, so that memory does not grow with edges. What gets no answer is asked again. An answer
counts once: whichever comes first.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atoll.federated.flower import Error, Message, RecordDict
from atoll.federated.grid import EDGE_FAILED, EDGE_LEFT, CoordinatorGrid, numbered
from atoll.federated.payload import num_bytes
from atoll.fleet.links.frames import ANSWER_BYTES, Frame, page_of
from atoll.scratch import scratch_folder

ASK_AGAIN_SECONDS = 10.0
"""After so long without an answer a question is asked again, and then after twice as long."""
LEFT = "it left of its own will, and takes part again when `atoll fleet join` runs there"
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
    """Where questions wait to be carried, and answers to be taken."""

    def __init__(self, *, ask_again: float = ASK_AGAIN_SECONDS, ask_lost: float = LOST_SECONDS) -> None:
        self._ask_again, self._ask_lost = ask_again, ask_lost
        self._folder = scratch_folder("atoll-asked-")
        self._open: dict[int, _Open] = {}
        self._due: list[tuple[float, int]] = []
        """When to ask what, the earliest first."""
        self._changed = threading.Condition()
        self._answers: dict[int, _Open] = {}
        """Questions with answers that nobody has taken yet, in the order these came."""
        self._number, self._closed = 0, False
        self._away: frozenset[int] = frozenset()
        self._heard: dict[int, float] = {}
        """When each node answered last."""

    @property
    def is_closed(self) -> bool:
        """Whether nothing is carried any more."""
        return self._closed

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

    def answers(self, numbers: Iterable[int], deadline: float | None, least: int | None = None) -> Iterator[Message]:
        """The answers to these questions as they come, until the deadline.

        Where `least` is given and so many may still come, nodes that left answer at once, with an error that says so.
        """
        left, num_good = set(numbers), 0
        while left:
            with self._changed:
                while not (here := [number for number in self._answers if number in left]):
                    gone = [number for number in left if number in self._open and self._node(number) in self._away]
                    if gone and least is not None and num_good + len(left) - len(gone) >= least:
                        break
                    # In slices, because a wait without end cannot be interrupted by the user.
                    wait = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
                    if wait <= 0:
                        return
                    self._changed.wait(wait)
                asked = self._answers.pop(here[0]) if here else self._open.pop(gone[0])
            left.discard(here[0] if here else gone[0])
            frame = Frame.from_bytes(asked.path.read_bytes())
            asked.path.unlink()
            if not here:
                yield Message(Error(EDGE_LEFT, LEFT), reply_to=asked.message)
                continue
            num_good += frame.problem is None
            yield Message(frame.content if frame.problem is None else Error(EDGE_FAILED, page_of(frame.problem)), reply_to=asked.message)

    def are_away(self, nodes: Collection[int], seen: float) -> None:
        """These nodes, and no others, have said goodbye; `seen` is when that was asked, and an answer that came since says more."""
        with self._changed:
            self._away = frozenset(node for node in nodes if self._heard.get(node, seen) <= seen)
            self._changed.notify_all()

    def let_go(self, numbers: Iterable[int]) -> None:
        """Ask these no more; what answers them from now on, or was not taken, does not count."""
        with self._changed:
            for number in numbers:
                for asked in (self._open.pop(number, None), self._answers.pop(number, None)):
                    if asked is not None:
                        asked.path.unlink(missing_ok=True)

    def leave(self, node: int, page: str) -> None:
        """A node is gone for good: what is open for it is answered with this page."""
        with self._changed:
            left = [number for number in self._open if self._node(number) == node]
        for number in left:
            self.reply(Frame(number, node, "", "", RecordDict(), problem=page))

    def close(self) -> None:
        """Let whoever carries end; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._folder.cleanup()

    def ask_all_again(self) -> None:
        """All that is open is due, as whoever carried it is gone."""
        with self._changed:
            for waiting in sorted(self._open):
                self._plan(waiting, 0.0)

    def due(self, seconds: float) -> Iterator[Frame]:
        """The questions that are due now; where none is, those that are within so long."""
        deadline = time.monotonic() + seconds
        while (number := self._next_due(deadline)) is not None:
            deadline = 0.0
            try:
                data = (Path(self._folder.name) / f"{number}.frame").read_bytes()
            except FileNotFoundError:
                continue  # Answered since, or let go.
            yield Frame.from_bytes(data)

    def reply(self, frame: Frame) -> None:
        """Take an answer; one to a question that is open no more does not count."""
        with self._changed:
            asked = None if self._closed else self._open.get(frame.number)
            if asked is not None and frame.is_lost:
                self._plan(frame.number, self._ask_lost)
            elif asked is not None:
                self._heard[frame.node] = time.monotonic()
                self._away -= {frame.node}
                # In place of the question, in one step: it may be read at this moment.
                answer = asked.path.with_suffix(".answer")
                answer.write_bytes(frame.to_bytes())
                asked.path.unlink()
                self._answers[frame.number] = replace(self._open.pop(frame.number), path=answer)
                self._changed.notify_all()

    def _node(self, number: int) -> int:
        return self._open[number].message.metadata.dst_node_id

    def _plan(self, number: int, seconds: float) -> None:
        """Ask after so long, whatever was planned before; from there on with patience, as at first."""
        asked = self._open[number]
        asked.due, asked.wait = time.monotonic() + seconds, self._ask_again
        heapq.heappush(self._due, (asked.due, number))
        self._changed.notify_all()

    def _next_due(self, deadline: float) -> int | None:
        with self._changed:
            while not self._closed:
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
                if now >= deadline:
                    return None
                self._changed.wait(min(deadline, self._due[0][0] if self._due else deadline) - now)
            return None

    def _holds(self, due: float, number: int) -> bool:
        return number in self._open and self._open[number].due == due


class FleetGrid(CoordinatorGrid):
    """Flower's Grid over a relay, for some of a fleet's nodes."""

    def __init__(self, relay: Relay, nodes: Mapping[int, str], least: int | None = None) -> None:
        """`least`: as in `Relay.answers`, of all that is sent and received."""
        super().__init__()
        self._relay, self._nodes, self._least = relay, dict(nodes), least

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
            yield from self._relay.answers(numbers, deadline, self._least)
        finally:
            self._relay.let_go(numbers)
