"""An edge's node: fetches questions from the coordinator, has them answered, and brings the answers back; what fails is tried again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from atoll.errors import ProtocolError
from atoll.federated.flower import ConfigRecord, Message, MessageType, RecordDict
from atoll.fleet.files import EdgeFolder
from atoll.fleet.links.flower import DAMAGE, FAILURES, EdgeLink
from atoll.fleet.links.frames import PROBLEM, Frame, packed, unpacked
from atoll.fleet.links.way import open_way, said
from atoll.jobs.backends.fleet import FINISHED
from atoll.split.certificates import DeviceTls

log = logging.getLogger(__name__)
_QUICK, _SLOW = 0.2, 3.0
"""An edge that was asked lately looks for more soon, and leaves a coordinator that is silent in peace."""
_SHORTEST_WAIT, _LONGEST_WAIT = 1.0, 8.0
_RUN_IS_OVER = 403
_PASSES_BY = (502, 503, 504)
"""Answers of who stands before a SuperLink that is away for a while."""


def serve(folder: EdgeFolder, answer: Callable[[bytes], bytes], tell: Callable[[str], None], stop: threading.Event) -> None:
    """Answer the coordinator's questions until `stop` is set; `tell` is told, once, why it cannot be reached.

    Raises: TransportError for certificates that are of no use.
    """
    address, tls = folder.read().superlink, DeviceTls(folder.ca, folder.cert, folder.key)
    trouble = _Trouble(address, tell, stop)
    while not stop.is_set():
        try:
            with open_way(address, tls) as http, EdgeLink(address, http, folder.node_key) as link, _leaving(link, tell):
                _until_stopped(link, answer, trouble, stop)
        except FAILURES as problem:
            trouble.wait(problem)


@contextmanager
def _leaving(link: EdgeLink, tell: Callable[[str], None]) -> Iterator[None]:
    """Says goodbye where the edge ends, and not where it only begins anew."""
    try:
        yield
    except FAILURES:
        raise
    except BaseException:
        _say_goodbye(link, tell)
        raise
    _say_goodbye(link, tell)


def _say_goodbye(link: EdgeLink, tell: Callable[[str], None]) -> None:
    heard = link.say_goodbye()
    tell("this edge leaves: the coordinator was told" if heard else "this edge leaves; no coordinator was there to be told")


def _until_stopped(link: EdgeLink, answer: Callable[[bytes], bytes], trouble: _Trouble, stop: threading.Event) -> None:
    """A coordinator that is away for a while finds the node as it was.

    Raises: FAILURES where the node has to begin anew.
    """
    pause, reply, seconds = _SLOW, None, 0.0
    while not stop.is_set():
        try:
            if reply is None and (message := link.pull()) is not None:
                trouble.is_expected = message.metadata.message_type == f"{MessageType.QUERY}.{FINISHED}"
                begun = time.monotonic()
                reply = answered(message, answer)
                seconds, pause = time.monotonic() - begun, _QUICK
            if is_idle := reply is None:
                pause = min(1.3 * pause, _SLOW)
            else:
                _push(link, reply, seconds)
                reply = None
        except (httpx.TransportError, httpx.HTTPStatusError) as problem:
            if isinstance(problem, httpx.HTTPStatusError) and problem.response.status_code not in _PASSES_BY:
                raise
            trouble.wait(problem)
            continue
        trouble.over()
        if is_idle:
            stop.wait(pause)


def _push(link: EdgeLink, reply: Message, seconds: float) -> None:
    try:
        link.push(reply, seconds)
    except httpx.HTTPStatusError as problem:
        if problem.response.status_code != _RUN_IS_OVER:
            raise


class _Trouble:
    """What keeps an edge from its coordinator: told once, and waited out for longer each time."""

    def __init__(self, address: str, tell: Callable[[str], None], stop: threading.Event) -> None:
        self._address, self._tell, self._stop = address, tell, stop
        self._told, self._wait, self._was_there = "", _SHORTEST_WAIT, False
        self.is_expected = False
        """Whether the coordinator has said that its run is complete: then it goes."""

    def wait(self, problem: Exception) -> None:
        """Some seconds, before it is tried again."""
        is_silent = self.is_expected and (isinstance(problem, httpx.ConnectError) or not self._told)
        if (why := said(self._address, problem)) != self._told and not is_silent:
            away = "the run is over, or its coordinator away; " if self._was_there else ""
            self._tell(f"{away}{why}; it is tried again")
        self._told = why
        self._stop.wait(self._wait)
        self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def over(self) -> None:
        """The coordinator has answered."""
        self._told, self._wait, self._was_there = "", _SHORTEST_WAIT, True


def answered(message: Message, answer: Callable[[bytes], bytes]) -> Message:
    """The reply to a message, whatever it holds: its records are read as values, and nothing in them is run."""
    metadata = message.metadata
    try:
        question = Frame(0, metadata.dst_node_id, metadata.message_type, metadata.group_id, unpacked(message.content))
        frame = Frame.from_bytes(answer(question.to_bytes()))
    except ProtocolError as problem:
        return _problem(message, problem.page())
    except DAMAGE as problem:
        log.warning("a message that this edge cannot follow", exc_info=True)
        # What the exception says may quote a row, which stays here.
        return _problem(message, ProtocolError("a message that this edge cannot follow", got=type(problem).__name__).page())
    return Message(packed(frame.content), reply_to=message) if frame.problem is None else _problem(message, frame.problem)


def _problem(message: Message, page: str) -> Message:
    return Message(packed(RecordDict({PROBLEM: ConfigRecord({"page": page})})), reply_to=message)
