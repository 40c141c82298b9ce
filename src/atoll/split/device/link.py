"""How good the link to a host is: the time of its shortest call, and of bytes that go there and come back."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from atoll.split.transport import SERVICE, fetch_status, lost_call
from atoll.wire import protocol_pb2 as pb
from atoll.wire.handshake import PROTOCOL

CALL_SECONDS = 60.0
WARM_UP_CALLS, CALLS = 2, 11
SMALLEST_UPLOAD_BYTES, LARGEST_UPLOAD_BYTES = 2**16, 2**21
"""A host takes messages of up to 4 MiB."""
LONG_ENOUGH_SECONDS = 0.25
"""A transfer that takes so long is large enough to go by."""
UPLOADS, DOWNLOADS = 3, 3
DOWNLOAD_SECONDS, DOWNLOAD_BYTES = 5.0, 2**26
"""No more than that of the base is fetched; nothing is kept."""
_PADDING_TAG = b"\xfa\x7f"
"""Field 2047, bytes, which no version of StatusRequest has: a reader of protobuf passes over what it does not know."""


@dataclass(frozen=True, slots=True)
class Link:
    """What was measured; None where it could not be, and `note` says why."""

    round_trip_seconds: tuple[float, ...]
    up_bits_per_second: float
    down_bits_per_second: float | None
    note: str = ""

    @property
    def latency_seconds(self) -> float:
        """One way: half the median round trip."""
        return statistics.median(self.round_trip_seconds) / 2

    @property
    def bits_per_second(self) -> float:
        """The slower direction: an adapter goes both ways."""
        return min(self.up_bits_per_second, self.down_bits_per_second or self.up_bits_per_second)


def measure_link(channel: grpc.Channel, clock: Callable[[], float] = time.perf_counter) -> Link:
    """Ask the host for its status, again and again and with padding, and fetch the beginning of its base.

    Raises: HostLostError.
    """
    for _ in range(WARM_UP_CALLS):  # The first makes the connection, and the host works out what it says of itself.
        fetch_status(channel, CALL_SECONDS)
    trips = tuple(_seconds(clock, lambda: fetch_status(channel, CALL_SECONDS)) for _ in range(CALLS))
    down, note = _download(channel, clock)
    return Link(trips, _upload(channel, clock, statistics.median(trips)), down, note)


def _upload(channel: grpc.Channel, clock: Callable[[], float], trip_seconds: float) -> float:
    """Bits per second of status calls with so much padding that the link takes a while for it."""
    num_bytes = SMALLEST_UPLOAD_BYTES
    while num_bytes < LARGEST_UPLOAD_BYTES and _seconds(clock, _padded(channel, num_bytes)) - trip_seconds < LONG_ENOUGH_SECONDS:
        num_bytes *= 2
    call = _padded(channel, num_bytes)
    seconds = statistics.median(_seconds(clock, call) for _ in range(UPLOADS)) - trip_seconds
    return 8 * num_bytes / max(seconds, 1e-6)


def _padded(channel: grpc.Channel, num_bytes: int) -> Callable[[], None]:
    # Random, as something on the way may compress.
    request = _PADDING_TAG + _varint(num_bytes) + os.urandom(num_bytes)
    ask: Any = channel.unary_unary(f"/{SERVICE}/Status")

    def call() -> None:
        try:
            ask(request, timeout=CALL_SECONDS)
        except grpc.RpcError as problem:
            raise lost_call(problem.code(), problem.details()) from None

    return call


def _download(channel: grpc.Channel, clock: Callable[[], float]) -> tuple[float | None, str]:
    """Bits per second of a base's part; of several fetches where one is too short to go by."""
    num_bytes, seconds, note = 0, 0.0, ""
    for _ in range(DOWNLOADS):
        more_bytes, more_seconds, note = _fetch(channel, clock)
        num_bytes, seconds = num_bytes + more_bytes, seconds + more_seconds
        if note or seconds >= LONG_ENOUGH_SECONDS:
            break
    if num_bytes == 0:
        return None, note or "the host sent too little of its base to go by"
    return 8 * num_bytes / max(seconds, 1e-6), ""


def _fetch(channel: grpc.Channel, clock: Callable[[], float]) -> tuple[int, float, str]:
    """Bytes and seconds of what follows the first frame, before which the host makes the part; and why there is no more of it."""
    part: Any = channel.unary_stream(f"/{SERVICE}/Part")
    call = part(pb.PartRequest(protocol=PROTOCOL).SerializeToString(), timeout=CALL_SECONDS)
    started: float | None = None
    seconds, num_bytes = 0.0, 0
    try:
        for frame in call:
            now = clock()
            if started is None:
                started = now
                continue
            num_bytes, seconds = num_bytes + len(frame), now - started
            if seconds > DOWNLOAD_SECONDS or num_bytes >= DOWNLOAD_BYTES:
                break
    except grpc.RpcError as problem:
        return num_bytes, seconds, f"the host did not send its base: {lost_call(problem.code(), problem.details()).got}"
    finally:
        call.cancel()
    return num_bytes, seconds, ""


def _seconds(clock: Callable[[], float], call: Callable[[], object]) -> float:
    started = clock()
    call()
    return clock() - started


def _varint(number: int) -> bytes:
    """As protobuf writes lengths: seven bits a byte, lowest first, the top bit where more follow."""
    found = bytearray()
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes((*found, number))
