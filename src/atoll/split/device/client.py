"""Reach a host from the device: open sessions, come back after a loss, and count what crossed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from atoll.cost.traffic import WireAccount
from atoll.errors import FrameError, HostLostError, HostRefusedError, ProtocolError
from atoll.printable import printable
from atoll.split.counted_stream import CountedStream, Transport
from atoll.split.cut import Cut
from atoll.split.device.blocks import Given, RemoteBlocks
from atoll.split.device.exchange import Session
from atoll.split.device.patience import LONGEST_PAUSE_SECONDS, Patience
from atoll.wire import protocol_pb2 as pb
from atoll.wire.byte_formulas import WireMode, largest_message_bytes
from atoll.wire.dialogue import Dialogue
from atoll.wire.handshake import PROTOCOL, refusal_error, wait_error

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Terms:
    """What the device tells the host of itself."""

    atoll_version: str
    base_digest: str
    tokenizer_digest: str
    cut: Cut
    kind: str
    mode: WireMode
    codec: str
    precision: str
    max_tokens: int
    """Padded tokens of the largest micro-batch."""
    d_model: int
    adapter_codec: str = "fp32"
    """In lent mode."""
    tokenizer: str = ""
    """Which it is, for people."""
    chosen: bool = False
    """Whether the mode is not what run.toml says, but what was found to be quickest."""


class Client:
    """A device's way to its host. `transport` opens a stream; `account` counts what crossed all of them."""

    def __init__(
        self, host: str, terms: Terms, transport: Callable[[], Transport], patience_seconds: float,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._host, self._terms, self._transport = host, terms, transport
        self._patience, self._clock, self._sleep = patience_seconds, clock, sleep
        self.on_lost: Callable[[str], None] = lambda reason: None
        """Told why the host is lost and for how long it will be tried again: at once, and now and then while it lasts."""
        self.on_held: Callable[[str], None] = lambda reason: None
        """Told why, the first time that the host holds an exchange back."""
        self._held_since, self._was_held = 0.0, False
        self.account = WireAccount()
        self.blocks: RemoteBlocks | None = None

    def use(self, mode: WireMode) -> None:
        """Go on in this mode; a session in another ends."""
        if mode != self._terms.mode:
            self.end()
            self._terms = replace(self._terms, mode=mode)

    def connect(self, adapters: Given) -> Session:
        """A session for these adapters.

        Raises: HostRefusedError, HostLostError, ProtocolError.
        """
        stream = CountedStream(Dialogue("device"), self._transport(), self._terms.codec)
        stream.sent_bytes, stream.received_bytes = self.account.sent, self.account.received
        stream.on_wait = self._be_held
        try:
            groups = self._greet(stream, adapters)
        except BaseException:
            stream.transport.close()  # Else its threads and the stream would outlast what failed.
            raise
        return Session(stream, groups, self._terms.mode, self._host, self._terms.adapter_codec)

    def _greet(self, stream: CountedStream, adapters: Given) -> tuple[tuple[str, ...], ...]:
        terms, pairs, killed = self._terms, adapters.trained, adapters.killed
        lends = terms.mode == "lent"
        modules = [pb.Module(name=name, rank=pair.size[2], scaling=pair.scaling if lends else 0.0) for name, pair in pairs.items()]
        how = "merge" if adapters.merges else "offload"
        modules += [pb.Module(name=name, rank=pair.size[2], killed=how, scaling=pair.scaling) for name, pair in killed.items()]
        stream.send(pb.Hello(
            protocol=PROTOCOL, atoll_version=terms.atoll_version, base_digest=terms.base_digest, tokenizer_digest=terms.tokenizer_digest,
            cut_front=terms.cut.front, cut_back=terms.cut.back, adapter_kind=terms.kind, modules=modules, wire_mode=terms.mode,
            codec=terms.codec, precision=terms.precision, max_tokens=terms.max_tokens, adapter_codec=terms.adapter_codec if lends else "",
            dropout=max((pair.dropout for pair in pairs.values()), default=0.0) if lends else 0.0,
        ))  # fmt: skip
        answer = stream.receive()
        if answer.kind == "refusal":
            raise self._refused(answer.body)
        groups = tuple(tuple(group.modules) for group in answer.body.groups)
        sizes = [[pairs[name].size for name in names] for names in groups]
        widths = [sorted({d_in for d_in, _, _ in group}) for group in sizes]
        if any(len(each) > 1 for each in widths):
            raise ProtocolError(
                "the host puts modules together that do not read the same", where=self._host, got=f"groups with inputs of {widths}",
                expected="one width for each group", do="use the same base on both sides; if it stays so, do not trust this host",
            )  # fmt: skip
        stream.allow(largest_message_bytes(sizes, terms.d_model, terms.max_tokens))
        if killed:
            matrices = [matrix for pair in killed.values() for matrix in (pair.down_RI, pair.up_OR)]
            stream.send(pb.Killed(), matrices, ["fp32"] * len(matrices))
        return groups

    def _be_held(self, wait: pb.Wait, is_first: bool) -> None:
        """The host holds an exchange back: as long as patience lasts, whatever it says each time.

        Raises: HostLostError.
        """
        # A moment is no loss, also for a device that is to come back from none.
        patience = max(self._patience, LONGEST_PAUSE_SECONDS)
        now = self._clock()
        self._held_since = now if is_first else self._held_since
        error = wait_error(wait, self._host)
        if now + error.retry_seconds > self._held_since + patience:
            raise error
        if not self._was_held:
            self._was_held = True
            self.on_held(printable(f"{error.what}; {error.expected}"))

    def _refused(self, refusal: pb.Refusal) -> HostRefusedError | HostLostError:
        error = refusal_error(refusal, self._host)
        if refusal.field == "tokenizer_digest" and self._terms.tokenizer:
            error.got = self._terms.tokenizer
        if self._terms.chosen and refusal.field == "wire_mode":
            # Nobody wrote this mode: an older host does not know it.
            error.do = 'write mode = "dense" below [wire], or another of the host\'s, in place of "auto"; or update Atoll on the host'
        return error

    def end(self) -> None:
        """Say goodbye to the host."""
        if self.blocks is not None:
            self.blocks.end()

    def retrying_in(self, mode: WireMode | None, attempt: Callable[[], T]) -> T:
        """The same as `retrying`, in this mode: edges that share a client may each have their own."""
        if mode is not None:
            self.use(mode)
        return self.retrying(attempt)

    def retrying(self, attempt: Callable[[], T]) -> T:
        """Do something that needs the host; where the host is lost, connect again and do it anew, as long as patience lasts.

        A host that says when to come again is not asked before, nor waited for in vain where that is longer than patience lasts.

        Nothing that an attempt does may outlast its failure: a training step changes the adapters only at its very end.

        Raises: HostLostError, or FrameError, after the last try.
        """
        patience = Patience(self._patience, self._clock)
        while True:
            try:
                return attempt()
            except (HostLostError, FrameError) as problem:
                if self.blocks is not None:
                    self.blocks.drop()
                seconds = patience.pause_seconds(problem)
                if seconds is None:
                    raise
                if news := patience.news(problem):
                    self.on_lost(news)
                self._sleep(seconds)
