"""Tenants of one host: honest ones that train, and one that does its worst within its limits."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.targets import resolve_targets
from atoll.base.head import loss_sum
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Adapter, Cut, Data, Model, RunConfig, Train, Wire
from atoll.errors import PeerError
from atoll.jobs.split import HostAccess, SplitSide, join
from atoll.split.certificates import DeviceTls, open_channel
from atoll.split.device.blocks import Given
from atoll.split.device.exchange import Session
from atoll.split.transport import SERVICE
from atoll.tasks.batches import Batch, pad_batch
from atoll.tasks.tokens import Example
from atoll.training.step import new_stepper
from atoll.wire import protocol_pb2 as pb
from atoll.wire.encoding import encode
from atoll.wire.frames import Message, Packer
from atoll.wire.handshake import PROTOCOL

CUT, RANK = (1, 0), 8


@dataclass(frozen=True)
class Size:
    """Of micro-batches."""

    rows: int
    tokens: int
    most: int
    """Positions that the host takes."""
    context: int
    """Positions of the longest row."""


SIZES = {"tiny": Size(2, 16, 64, 32), "15M": Size(2, 64, 1024, 256)}


def access(address: str, folder: Path, tenant: str) -> HostAccess:
    """How a tenant reaches the host."""
    return HostAccess(address, DeviceTls(folder / "ca.pem", folder / f"tenant-{tenant}.pem", folder / f"tenant-{tenant}.key"))


def side_of(base: str, size: Size, host: HostAccess) -> SplitSide:
    """A device's part of the base, joined to the host."""
    front, back = CUT
    settings = RunConfig(
        model=Model(cut=Cut(front=front, back=back)), data=Data(max_length=size.tokens), adapter=Adapter(rank=RANK),
        wire=Wire(mode="factored", reconnect=60.0),
    )  # fmt: skip
    return join(base, settings, host, size.most)


class Honest:
    """A device that trains: steps on its own rows, and after each a pause for what else a device has to do, of no fixed length.

    With a fixed one all would ask at the same moment, again and again.
    """

    def __init__(self, base: str, size: Size, host: HostAccess, number: int, pause: float) -> None:
        self.steps: list[tuple[float, float]] = []
        """Begin and end of each step but the first, which opens the session."""
        self.losses: list[float] = []
        """Of each of them; equal steps of equal devices have equal ones, whoever else is on the host."""
        self.lost: list[str] = []
        self.failed = ""
        self.num_tokens = size.rows * size.tokens
        self._side, self._pause, self._pauses = side_of(base, size, host), pause, np.random.default_rng(number)
        self._side.client.on_lost = self.lost.append
        self._batch = _batch(size, number, self._side.base.model.config.vocab_size)
        shapes = read_shapes(base)
        names = resolve_targets(["q_proj", "k_proj", "v_proj"], shapes.modules)
        sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules if module.name in names}
        self._adapters = fresh_adapters("lora", sizes, dict.fromkeys(sizes, RANK), 16, number)

    def train(self, until: threading.Event) -> None:
        """Until told to end."""
        try:
            with attached(self._side.base.model, self._adapters) as on:
                stepper, number = new_stepper(on, Train(), 1_000_000, {}), 0
                while not until.is_set():
                    start = time.perf_counter()
                    (loss, *_) = self._side.client.retrying(lambda: self._step(stepper, number))  # noqa: B023
                    if number:
                        self.steps.append((start, time.perf_counter()))
                        self.losses.append(loss)
                    until.wait(self._pauses.exponential(self._pause))
                    number += 1
            self._side.close()
        except PeerError as problem:
            self.failed = problem.page()

    def _step(self, stepper: Any, number: int) -> tuple[float]:
        losses: list[float] = []

        def loss_of(batch: Batch) -> torch.Tensor:
            total = loss_sum(self._side.base.model, batch)
            losses.append(float(total.detach()))
            return total

        stepper.step([self._batch], loss_of, number)
        return (losses[0],)


def _batch(size: Size, number: int, vocabulary: int) -> Batch:
    random, loss = np.random.default_rng(number), np.arange(size.tokens) >= size.tokens // 2
    return pad_batch([Example(random.integers(3, vocabulary, size.tokens, dtype=np.int32), loss) for _ in range(size.rows)], 0)


class Worst:
    """A tenant that does everything at once that its limits let it do, and tries what they do not."""

    def __init__(self, base: str, size: Size, address: str, folder: Path, tenant: str) -> None:
        self._size, self._address, self._access = size, address, access(address, folder, tenant)
        self._side = side_of(base, size, self._access)
        self._width = int(self._side.base.model.config.get_text_config().hidden_size)
        self._until = threading.Event()
        self._threads: list[threading.Thread] = []
        self.did: Counter[str] = Counter()

    def start(self) -> None:
        """Begin with all of it."""
        self._until.clear()
        self._threads = [threading.Thread(target=self._again, args=(work,), daemon=True) for work in (
            self._fill, self._pad, self._cheat, self._be_silent, self._be_silent, self._fetch_slowly, self._fetch_too_much, self._ask,
        )]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all of it."""
        self._until.set()
        for thread in self._threads:
            thread.join(30)

    def _again(self, work: Callable[[], None]) -> None:
        while not self._until.is_set():
            try:
                work()
            except (PeerError, grpc.RpcError):
                self.did[f"{work.__name__.strip('_')}: refused"] += 1
            self._until.wait(0.05)

    @contextmanager
    def _session(self) -> Iterator[Session]:
        session = self._side.client.connect(Given({}, {}, False))
        try:
            yield session
        finally:
            session.stream.transport.close()

    def _fill(self) -> None:
        """The largest exchanges there may be, one after the other, with a backward pass through all blocks."""
        rows, positions = self._size.most // self._size.context, self._size.context
        h_ND = torch.zeros(rows * positions, self._width)
        with self._session() as session:
            talk = session.stream
            while not self._until.is_set():
                number = talk.dialogue.exchange
                talk.send(pb.Forward(exchange=number, rows=rows, positions=positions, train=True, want_front_gradient=True), [h_ND])
                self._expect(talk.receive(), "hidden")
                talk.send(pb.HiddenGradient(exchange=number), [h_ND])
                self._expect(talk.receive(), "finished")
                self.did["largest exchanges"] += 1

    def _pad(self) -> None:
        """One long row, to which others of one token are padded: the most positions for the fewest bytes."""
        positions = self._size.context
        lengths = [positions, *[1] * (self._size.most // positions - 1)]
        h_ND = torch.zeros(sum(lengths), self._width)
        with self._session() as session:
            talk = session.stream
            while not self._until.is_set():
                forward = pb.Forward(exchange=talk.dialogue.exchange, rows=len(lengths), positions=positions, lengths=lengths)
                talk.send(forward, [h_ND])
                self._expect(talk.receive(), "hidden")
                self.did["padded exchanges"] += 1

    def _cheat(self) -> None:
        """One token in a row of many positions."""
        with self._session() as session:
            talk = session.stream
            forward = pb.Forward(rows=1, positions=self._size.context, lengths=[1])
            for frame in Packer().frames(Message(forward, (encode(torch.zeros(1, self._width), "fp32"),))):
                talk.transport.write(frame)
            talk.transport.read()
            self.did["rows longer than any of their tokens"] += 1
        self._until.wait(1.0)

    @staticmethod
    def _expect(message: Any, kind: str) -> None:
        if message.kind != kind:
            raise PeerError(message.kind)

    def _be_silent(self) -> None:
        """Thirty streams that never say a word, on a connection of their own, and a while later thirty others."""
        release = threading.Event()

        def silence() -> Iterator[bytes]:
            release.wait(60)
            yield from ()

        with self._channel() as channel:
            calls: list[Any] = [channel.stream_stream(f"/{SERVICE}/Train")(silence()) for _ in range(30)]
            self._until.wait(2.0)
            for call in calls:
                call.cancel()
            release.set()
        self.did["silent streams"] += len(calls)

    def _fetch_slowly(self) -> None:
        """Its own part, of which it takes a frame now and then."""
        with self._channel() as channel, ExitStack() as stack:
            calls = [self._part(channel, *CUT) for _ in range(4)]
            for call in calls:
                stack.callback(call.cancel)
            for _ in range(5):
                for call in calls:
                    with suppress(grpc.RpcError, StopIteration):
                        next(call)
                self._until.wait(1.0)
        self.did["parts fetched slowly"] += len(calls)

    def _fetch_too_much(self) -> None:
        with self._channel() as channel:
            for cut in ((3, 0), (0, 1)):
                with suppress(grpc.RpcError):
                    received = sum(len(frame) for frame in self._part(channel, *cut))
                    self.did["bytes of parts that are not its own"] += received if received > 2000 else 0  # A refusal is a small frame.
        self._until.wait(0.5)

    def _ask(self) -> None:
        with self._channel() as channel:
            for _ in range(20):
                channel.unary_unary(f"/{SERVICE}/Status")(b"", timeout=10)
                self.did["status"] += 1
        self._until.wait(0.5)

    def _part(self, channel: grpc.Channel, front: int, back: int) -> Any:
        part: Any = channel.unary_stream(f"/{SERVICE}/Part")
        return part(pb.PartRequest(protocol=PROTOCOL, cut_front=front, cut_back=back).SerializeToString())

    @contextmanager
    def _channel(self) -> Iterator[grpc.Channel]:
        channel = open_channel(self._address, self._access.tls, insecure=False)
        try:
            yield channel
        finally:
            channel.close()
