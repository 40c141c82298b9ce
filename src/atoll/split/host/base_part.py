"""Hand devices their part of the base, and no more of it: whole files, each with its SHA-256, made from the base's own as they are sent."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc

from atoll.base.part import PartFile, part_files
from atoll.errors import AtollError, ProtocolError
from atoll.split.cut import Cut
from atoll.split.host.audit import Audit, in_words
from atoll.split.host.compute_queue import ComputeQueue
from atoll.split.host.limits.budgets import Budgets
from atoll.split.host.tenants import Call
from atoll.split.transport import Alarm
from atoll.units import counted
from atoll.wire import protocol_pb2 as pb
from atoll.wire.encoding import raw
from atoll.wire.frames import CHUNK_BYTES, Message, Packer
from atoll.wire.handshake import PROTOCOL, reason_of

AT_ONCE, AT_ONCE_OF_TENANT = 8, 2
"""Calls at once: each keeps a thread."""
STALL_SECONDS = 60.0
"""How long a device may leave a frame where it is, and how long it may take for its request."""
SLOWEST_BYTES_PER_SECOND = 2**16
"""Half a megabit: a device that is slower, all told, is left."""
log = logging.getLogger(__name__)


class PartLimit:
    """Which blocks each tenant may fetch, over all its calls for as long as the host lives.

    With `most` None what one cut needs: no two calls whose blocks together are more than those of one of them, and no more than half of
    the base's blocks.
    """

    def __init__(self, num_blocks: int, most: Cut | None) -> None:
        self._most, self._half = most, -(-num_blocks // 2)
        self._granted: dict[str, Cut] = {}
        self._lock = threading.Lock()

    def grant(self, tenant: str, cut: Cut) -> str | None:
        """Note that the tenant fetches this; where it may not, what it may in words."""
        with self._lock:
            before = self._granted.get(tenant, Cut(0, 0))
            together = Cut(max(before.front, cut.front), max(before.back, cut.back))
            if self._most is not None:
                if together.front > self._most.front or together.back > self._most.back:
                    return f"front = {self._most.front}, back = {self._most.back} at most"
            elif together.front + together.back > self._half:
                return f"{counted(self._half, 'block')} at most, front and back together"
            elif together not in (before, cut):
                return f"what one cut needs, as front = {before.front}, back = {before.back}, which were fetched before"
            self._granted[tenant] = together
            return None


class Parts:
    """Answers the Part calls of a host whose base is `source`."""

    def __init__(self, source: str, limit: PartLimit, budgets: Budgets, compute_queue: ComputeQueue, audit: Audit) -> None:
        self._source, self._limit, self._budgets, self._queue, self._audit = source, limit, budgets, compute_queue, audit
        self._digests: dict[tuple[Cut, str], str] = {}
        """By cut and name of the file: else a call that is hung up on at once would have the whole part read again."""

    def serve(self, call: Call) -> Iterator[bytes]:
        """The answer to one pb.PartRequest."""
        sent, alarm, begun = _Sent(), Alarm(call.context.cancel), time.monotonic()
        try:
            with alarm.within(STALL_SECONDS):
                request = call.request(pb.PartRequest)
            _check_protocol(request.protocol)
            sent.cut = Cut(request.cut_front, request.cut_back)
            for frame in self._answer(call, sent, alarm):
                # gRPC goes on only when the frame is under way: without an alarm a device that does not read would keep this thread.
                with alarm.within(STALL_SECONDS):
                    yield frame
                sent.num_bytes += len(frame)
        except AtollError as problem:
            sent.refused = pb.Refusal(code="dialogue", field=problem.what, host_value=problem.expected, device_value=problem.got)
            call.context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem.page())
        finally:
            alarm.close()
            facts = {
                "front": sent.cut.front, "back": sent.cut.back, "bytes": sent.num_bytes, "whole": sent.whole,
                "seconds": round(time.monotonic() - begun, 3),
            } | ({} if sent.refused is None else reason_of(sent.refused))  # fmt: skip
            self._audit.note("part", call.tenant, call.peer, facts)
            log.info("part for %s: %s", call.tenant or "a device without a certificate", in_words(facts))

    def _answer(self, call: Call, sent: _Sent, alarm: Alarm) -> Iterator[bytes]:
        """The frames of a part, or of a refusal where the tenant may not have it or this machine's disk does not let it."""
        packer, cut = Packer(), sent.cut
        over = self._budgets.of(call.tenant).over_bytes()
        if over is not None:
            sent.refused = over.refusal()
            yield from packer.frames(Message(sent.refused))
            return
        most = self._limit.grant(call.tenant, cut)
        if most is not None:
            sent.refused = pb.Refusal(
                code="unfit", field="cut", host_value=most, device_value=f"front = {cut.front}, back = {cut.back}",
                do="set [model] cut to that, or ask who runs the host for more (its --max-part)",
            )  # fmt: skip
            yield from packer.frames(Message(sent.refused))
            return
        try:
            files = self._files(call.tenant, cut)
            with alarm.within(STALL_SECONDS + sum(file.num_bytes for file in files) / SLOWEST_BYTES_PER_SECOND):
                for file in files:
                    yield from _send_file(file, self._digests[cut, file.name], packer)
            sent.whole = True
        except OSError as problem:
            log.error("a device's part of the base cannot be sent: %s", problem)
            sent.refused = pb.Refusal(  # Without the folder, which is nobody's business elsewhere.
                code="failed", field="part of the base", host_value="files that can be read",
                device_value=problem.strerror or type(problem).__name__, do="ask who runs the host: the host's log says more",
            )  # fmt: skip
            yield from packer.frames(Message(sent.refused))

    def _files(self, tenant: str, cut: Cut) -> tuple[PartFile, ...]:
        """The files of the part, of all of which the digest is known: for a cut that is asked for first, all its bytes are read."""
        with self._queue.session(tenant) as turns, turns.slot():
            files = part_files(self._source, cut.front, cut.back)
            for file in files:
                if (cut, file.name) not in self._digests:
                    self._digests[cut, file.name] = _digest(file, turns.pause)
        return files


@dataclass(slots=True, eq=False)
class _Sent:
    """What came of a call."""

    cut: Cut = field(default_factory=lambda: Cut(0, 0))
    num_bytes: int = 0
    whole: bool = False
    refused: pb.Refusal | None = None


def _send_file(file: PartFile, sha256: str, packer: Packer) -> Iterator[bytes]:
    offset = 0
    # At least one piece: an empty file is told of by an empty one.
    for piece in _even(file.pieces(), CHUNK_BYTES) if file.num_bytes else (b"",):
        part = pb.FilePart(name=file.name, size=file.num_bytes, offset=offset, sha256=sha256)
        yield from packer.frames(Message(part, (raw(piece),)))
        offset += len(piece)


def _even(pieces: Iterator[bytes], num_bytes: int) -> Iterator[bytes]:
    """The same bytes in pieces of this size; the last may be smaller."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= num_bytes:
            yield bytes(held[:num_bytes])
            del held[:num_bytes]
    if held:
        yield bytes(held)


def _digest(file: PartFile, pause: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    for piece in file.pieces():
        digest.update(piece)
        pause()
    return digest.hexdigest()


def _check_protocol(protocol: int) -> None:
    if protocol != PROTOCOL:
        raise ProtocolError(
            "device and host speak different versions of the split protocol", where="protocol", got=str(protocol), expected=str(PROTOCOL),
            do="install the same version of Atoll on both sides",
        )  # fmt: skip
