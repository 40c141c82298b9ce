"""Carry frames over gRPC, between threads, or over a link that is slow on purpose."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from atoll.errors import HostLostError
from atoll.printable import printable
from atoll.wire import protocol_pb2 as pb

if TYPE_CHECKING:
    from atoll.split.counted_stream import Transport  # Opens torch, which a question for a host's status needs none of.

SERVICE = "atoll.split.v1.Split"
FRAMES_ON_THEIR_WAY = 16
"""A writer waits while so many frames are not taken yet: 16 MiB of memory for each direction of a session."""
GOODBYE_SECONDS = 1.0
OPTIONS = (
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.max_send_message_length", 4 * 2**20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.min_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 4_000),
)
"""A dead peer is found out within 40 s even where nobody sends. Frames are at most 1 MiB and a little."""
_GREETING = "if the host uses TLS, give its CA, and a certificate that it trusts if it asks for one"
_REASONS = (
    ("certificate has expired", "the host's certificate has expired", "get a new one for the host"),
    ("CERTIFICATE_VERIFY_FAILED", "the host's certificate is not signed by an authority that is trusted here",
     "give the CA that signed the host's certificate"),
    ("Hostname Verification Check failed", "the host's certificate is not for this address",
     "call the host by a name that its certificate lists, or make one that lists this address"),
    ("WRONG_VERSION_NUMBER", "the host does not speak TLS", "give no certificates for this host, or start it with its own"),
    ("Connection refused", "nobody listens there", "start the host, or mend the address"),
    ("errors resolving", "no machine has this name", "mend the address"),
    ("DNS resolution failed", "no machine has this name", "mend the address"),
    # After the first bytes of a connection: TLS without a word of what was missing.
    ("Socket closed", "the host hung up on the greeting", _GREETING),
    ("reset by peer", "the host hung up on the greeting", _GREETING),
)  # fmt: skip
"""What gRPC says when no connection comes about, in words: part of its text, what it means, what to do."""


Waiting = Callable[[], AbstractContextManager[None]]


class Outbox:
    """Frames that wait to be taken; an iterator for gRPC's sender."""

    def __init__(self) -> None:
        self._frames: queue.Queue[bytes | None] = queue.Queue(FRAMES_ON_THEIR_WAY)
        self._closed = threading.Event()

    def put(self, frame: bytes, waiting: Waiting) -> None:
        """Add a frame; waits while the box is full, within what `waiting` opens. Raises: HostLostError once it is closed."""
        if not self._closed.is_set():
            try:
                return self._frames.put_nowait(frame)
            except queue.Full:
                pass
        with waiting():
            while not self._closed.is_set():
                try:
                    return self._frames.put(frame, timeout=1.0)
                except queue.Full:
                    continue
        raise lost("the session was closed")

    def closed_within(self, seconds: float) -> bool:
        """Wait so long, or until it is closed."""
        return self._closed.wait(seconds)

    def close(self) -> None:
        """No more frames; those that wait are still taken."""
        self._closed.set()
        with suppress(queue.Full):  # The taker looks at the flag as soon as the box is empty.
            self._frames.put_nowait(None)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                frame = self._frames.get(timeout=1.0)
            except queue.Empty:
                if self._closed.is_set():
                    return
                continue
            if frame is None:
                return
            yield frame


class ClientTransport:
    """The device's end of a gRPC stream."""

    left_seconds = float("inf")

    def __init__(self, channel: grpc.Channel, idle_seconds: float) -> None:
        self._outbox, self.idle_seconds = Outbox(), idle_seconds
        self.waiting: Waiting = nullcontext
        train: Any = channel.stream_stream(f"/{SERVICE}/Train")
        self._call = train(iter(self._outbox), wait_for_ready=False)
        self._ended = threading.Event()
        # Nobody takes frames from a call that has ended: without this a writer would wait for room for ever.
        for action in (self._outbox.close, self._ended.set):
            if not self._call.add_callback(action):
                action()
        self._alarm = Alarm(self._call.cancel)

    def write(self, frame: bytes) -> None:
        """Hand a frame to gRPC."""
        try:
            if self._call.is_active():
                with self._alarm.within(self.idle_seconds):
                    return self._outbox.put(frame, self.waiting)
        except HostLostError:
            if self._call.is_active():
                raise  # It was closed here.
        raise self._lost()

    def read(self) -> bytes:
        """The next frame of the host."""
        try:
            with self._alarm.within(self.idle_seconds):
                frame: bytes = next(self._call)
                return frame
        except (grpc.RpcError, StopIteration):
            raise self._lost() from None

    def close(self) -> None:
        """End the call; what was written last is still sent, if the host takes it soon."""
        self._outbox.close()
        self._alarm.close()
        # gRPC cancels a call that nobody holds any more, with what waits to be sent.
        if not self._ended.wait(GOODBYE_SECONDS):
            self._call.cancel()

    def _lost(self) -> HostLostError:
        if self._alarm.rang:
            return lost(f"silence for {self.idle_seconds:.0f} s")
        return lost_call(self._call.code(), self._call.details())


class ServerTransport:
    """The host's end of a gRPC stream."""

    def __init__(self, requests: Iterator[bytes], cancel: Callable[[], None], idle_seconds: float) -> None:
        self.outbox = Outbox()
        self.idle_seconds = self.left_seconds = idle_seconds
        self.waiting: Waiting = nullcontext
        self._requests = requests
        self._alarm = Alarm(cancel)

    @property
    def silent(self) -> bool:
        """Whether the session was ended because the device let it wait."""
        return self._alarm.rang

    def write(self, frame: bytes) -> None:
        """Hand a frame to gRPC."""
        self.outbox.put(frame, self._full)

    def read(self) -> bytes:
        """The next frame of the device."""
        try:
            with self._device_time():
                return next(self._requests)
        except (grpc.RpcError, StopIteration, ValueError):
            raise lost("the device ended the stream") from None
        except Exception as problem:
            # gRPC's request iterator raises the bare Exception class when the call is cancelled; anything else is a bug and goes up.
            if type(problem) is not Exception:
                raise
            raise lost("the device is gone") from None

    def pause(self, seconds: float) -> None:
        """Let the device wait. Raises: HostLostError where it does not."""
        if self.outbox.closed_within(seconds):
            raise lost("the device is gone")

    def close(self) -> None:
        """End the call after what was written."""
        self.outbox.close()
        self._alarm.close()

    @contextmanager
    def _full(self) -> Iterator[None]:
        # What the session then waits for to go on, such as a slot to compute in, is not the device's time.
        with self.waiting(), self._device_time():
            yield

    @contextmanager
    def _device_time(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            with self._alarm.within(min(self.idle_seconds, self.left_seconds)):
                yield
        finally:
            self.left_seconds -= time.monotonic() - start


class Alarm:
    """Calls `ring` where something takes too long; one thread for all waits of a transport."""

    def __init__(self, ring: Callable[[], Any]) -> None:
        self._ring = ring
        self._deadlines: list[list[float]] = []
        self._closed = threading.Event()
        self.rang = False
        threading.Thread(target=self._run, name="atoll-alarm", daemon=True).start()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """`with alarm.within(60): wait()`, in any thread."""
        deadline = [time.monotonic() + seconds]
        self._deadlines.append(deadline)
        try:
            yield
        finally:
            self._deadlines[:] = [other for other in self._deadlines if other is not deadline]

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(0.5):
            if any(deadline[0] < time.monotonic() for deadline in tuple(self._deadlines)):
                self.rang = True
                self._ring()
                return


class ThreadTransport:
    """Two ends of a session within one process, for tests of the dialogue without sockets."""

    idle_seconds = left_seconds = float("inf")
    waiting: Waiting = nullcontext

    def __init__(self, inbox: queue.SimpleQueue[bytes | None], outbox: queue.SimpleQueue[bytes | None]) -> None:
        self._inbox, self._outbox = inbox, outbox

    @classmethod
    def pair(cls) -> tuple[ThreadTransport, ThreadTransport]:
        """Both ends."""
        up: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        down: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        return cls(down, up), cls(up, down)

    def write(self, frame: bytes) -> None:
        """Hand a frame to the other end."""
        self._outbox.put(frame)

    def read(self) -> bytes:
        """The next frame from the other end."""
        frame = self._inbox.get()
        if frame is None:
            raise lost("the other end closed")
        return frame

    def close(self) -> None:
        """The other end's next read fails."""
        self._outbox.put(None)


@dataclass(frozen=True, slots=True)
class SlowLink:
    """A link to imitate."""

    bits_per_second: float | None
    latency_seconds: float
    """One way."""


class SlowTransport:
    """Delays frames as a slow link would: each waits for those before it, takes its bytes' time, and arrives one latency later."""

    left_seconds = float("inf")

    def __init__(self, inner: Transport, link: SlowLink) -> None:
        self._inner, self._link = inner, link
        self.idle_seconds, self.waiting = inner.idle_seconds, inner.waiting
        self._up: queue.SimpleQueue[tuple[float, bytes] | None] = queue.SimpleQueue()
        self._down: queue.SimpleQueue[tuple[float, bytes] | HostLostError] = queue.SimpleQueue()
        self._up_free = 0.0
        for work in (self._send, self._receive):
            threading.Thread(target=work, name="atoll-slow-link", daemon=True).start()

    def write(self, frame: bytes) -> None:
        """Put a frame on the slow link."""
        self._up_free = self._free_after(self._up_free, frame)
        self._up.put((self._up_free + self._link.latency_seconds, frame))

    def read(self) -> bytes:
        """The next frame that came through."""
        item = self._down.get()
        if isinstance(item, HostLostError):
            raise item
        _sleep_until(item[0])
        return item[1]

    def close(self) -> None:
        """End the session after what is on its way."""
        self._up.put(None)

    def _free_after(self, free: float, frame: bytes) -> float:
        seconds = 8 * len(frame) / self._link.bits_per_second if self._link.bits_per_second else 0.0
        return max(free, time.monotonic()) + seconds

    def _send(self) -> None:
        while (item := self._up.get()) is not None:
            _sleep_until(item[0])
            try:
                self._inner.write(item[1])
            except HostLostError:
                break  # The reader is told the same.
        self._inner.close()

    def _receive(self) -> None:
        free = 0.0
        while True:
            try:
                frame = self._inner.read()
            except HostLostError as problem:
                self._down.put(problem)
                return
            free = self._free_after(free, frame)
            self._down.put((free + self._link.latency_seconds, frame))


def fetch_status(channel: grpc.Channel, timeout_seconds: float) -> pb.StatusReply:
    """What a host serves, how busy it is, and the sessions that the asker may see.

    Raises: HostLostError.
    """
    ask: Any = channel.unary_unary(
        f"/{SERVICE}/Status", request_serializer=pb.StatusRequest.SerializeToString, response_deserializer=pb.StatusReply.FromString
    )
    try:
        reply: pb.StatusReply = ask(pb.StatusRequest(), timeout=timeout_seconds)
        return reply
    except grpc.RpcError as problem:
        # gRPC raises calls that have ended, which its own types do not say.
        raise lost_call(problem.code(), problem.details()) from None


def lost(got: str, do: str = "see that the host runs and can be reached") -> HostLostError:
    """The other side is gone."""
    return HostLostError("the connection between host and device was lost", got=got, expected="an answer", do=do)


def lost_call(code: grpc.StatusCode | None, details: str | None) -> HostLostError:
    """What ended a call, in words; the details may be the other side's own."""
    details = "; ".join(printable(line.strip()) for line in (details or "").splitlines())
    if code is None or code is grpc.StatusCode.OK:
        return lost("the stream ended")
    if code is grpc.StatusCode.CANCELLED:
        return lost("the host ended the session, which was slow or silent for longer than it allows")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and details.startswith("tenant_"):
        return lost(f"the host takes no more from this device now ({details})", "come again when it says")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return lost(f"the host has too many calls at once ({details})", "try again later, or ask who runs the host for more sessions")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return lost(f"the host does not know this device: {details}", "give a certificate that the host's owner made for this device")
    if code is grpc.StatusCode.UNAVAILABLE and ("failed to connect" in details or "resol" in details):
        for part, meaning, do in _REASONS:
            if part in details:
                return lost(f"{meaning} ({details.rpartition('last error: ')[2]})", do)
    return lost(f"{code.name.lower().replace('_', ' ')}: {details}")


def _sleep_until(moment: float) -> None:
    delay = moment - time.monotonic()
    if delay > 0:
        time.sleep(delay)
