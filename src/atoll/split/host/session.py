"""The host's side of one session: greet, run exchanges on the shared base, and end without a trace.

Shape suffixes: N real tokens, D width.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from atoll.adapters.state import ModuleAdapter
from atoll.base.blocks import Trace
from atoll.base.load import Base
from atoll.errors import AtollError, FrameError, HostLostError, ProtocolError
from atoll.printable import printable
from atoll.remote_blocks import Layout
from atoll.split.counted_stream import CountedStream, check_shapes, tensors_of
from atoll.split.cut import Cut
from atoll.split.host.blocks.batching import Batcher, Lane
from atoll.split.host.blocks.kept import KeptRows, Shelf
from atoll.split.host.blocks.lent import LentAdapters, LentModule
from atoll.split.host.blocks.middle import KilledModule, Middle, Pass
from atoll.split.host.compute_queue import ComputeQueue, Turns
from atoll.split.host.limits.budgets import Over
from atoll.split.host.peer import DevicePeer
from atoll.wire import protocol_pb2 as pb
from atoll.wire.byte_formulas import largest_message_bytes
from atoll.wire.frames import Message
from atoll.wire.handshake import HostFacts, check_hello

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class SessionFigures:
    """What the host may tell of a session."""

    session: str
    tenant: str
    started_seconds: float = field(default_factory=time.monotonic)
    cut: Cut | None = None
    """As its Hello says."""
    num_tokens: int = 0
    num_positions: int = 0
    """Tokens and padding."""
    num_exchanges: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    """For turns to compute."""
    received_bytes: int = 0
    sent_bytes: int = 0
    """All four as of the last exchange."""
    refusal: pb.Refusal | None = None
    """What ended it; None: nothing of the kind."""
    cache_bytes: int = 0
    """Of keys and values that are kept for it."""
    on_tokens: Callable[[int], None] = lambda num_tokens: None
    """Told of every exchange's tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What a host serves: one base, shared by all sessions."""

    base: Base
    source: str
    """Where the base lies, for devices that ask for their part of it."""
    trace: Trace
    facts: Callable[[Cut], HostFacts]
    """What a device with this cut must agree with, all but the digest of the base."""
    base_digest: Callable[[Cut], str]
    """Digest of what a device with this cut holds; the first time for a cut, that much of the base is read."""
    bits: int
    idle_seconds: float
    """How long a device may be silent."""
    compute_queue: ComputeQueue
    recomputes: bool = False
    """Whether a session with lent adapters keeps no activations while its device computes."""
    batcher: Batcher | None = None
    """Where lent micro-batches that wait may go through the base together; only with `recomputes`."""
    exchange_seconds: float = float("inf")
    """How long a device may be waited for within one exchange, all told: else a frame now and then would keep a session for ever."""
    silence_seconds: float = float("inf")
    """How long a device may be silent between exchanges, all told: else one of a token now and then would keep a session for ever."""
    shelf: Shelf = field(default_factory=lambda: Shelf(0))
    """Keys and values from which generations go on."""
    while_waiting: Callable[[], None] = lambda: None
    """Done by a session before it waits for its device."""

    @property
    def width(self) -> int:
        """Of the hidden state."""
        return int(self.base.model.config.get_text_config().hidden_size)


class HostSession:
    """One device's session, from Hello to the end; runs in a thread of its own."""

    def __init__(
        self, served: Served, stream: CountedStream, figures: SessionFigures,
        admit: Callable[[int], Over | None] = lambda num_positions: None,
    ) -> None:  # fmt: skip
        """`admit` is told the positions of each exchange, may wait before it comes back, and says what limit forbids the exchange."""
        self._served, self._stream, self._figures, self._admit = served, stream, figures, admit
        self._silence_seconds, self._adapter_codec = served.silence_seconds, ""
        self._kept = served.shelf.open(figures)

    def run(self) -> None:
        """Serve the device until it says goodbye or fails. Whatever goes wrong is told to it and never leaves this session."""
        try:
            with self._served.compute_queue.session(self._figures.tenant) as turns, _Boundary(self._refuse):
                try:
                    self._serve(turns)
                finally:
                    self._count_use(turns)
        finally:
            self._kept.close()
            self._stream.transport.close()

    def _serve(self, turns: Turns) -> None:
        message = self._stream.receive()
        if message.kind == "bye":
            return
        hello = message.body
        self._stream.transport.left_seconds = self._served.idle_seconds  # Who has greeted has more time.
        cut = self._figures.cut = Cut(hello.cut_front, hello.cut_back)
        facts = self._served.facts(cut)

        def digest() -> str:
            with turns.slot():  # Reading the base is work like other work, and some cuts are asked for by nobody but to make some.
                return self._served.base_digest(cut)

        refusal = check_hello(hello, facts, digest)
        if refusal is not None:
            self._refuse(refusal)
            return
        ranks = {module.name: module.rank for module in hello.modules if not module.killed}
        groups = [kept for group in self._served.trace.groups if (kept := [name for name in group if name in ranks])]
        self._stream.codec = hello.codec
        peer = DevicePeer(
            self._stream, groups, facts, ranks, self._served.base.model, turns, while_waiting=self._served.while_waiting
        )
        peer.factored = hello.wire_mode == "factored"
        self._stream.send(pb.Welcome(
            session=self._figures.session, atoll_version=facts.atoll_version, groups=[pb.Group(modules=names) for names in groups],
            bits=self._served.bits, max_tokens=facts.max_tokens, idle_seconds=self._served.idle_seconds,
        ))  # fmt: skip
        widths = [[(*facts.modules[name], ranks[name]) for name in group] for group in groups]
        killed = [(*facts.modules[module.name], module.rank) for module in hello.modules if module.killed]
        max_tokens = min(hello.max_tokens, facts.max_tokens)
        self._stream.allow(largest_message_bytes(widths, self._served.width, max_tokens, killed=killed))
        self._stream.transport.idle_seconds = self._served.idle_seconds
        killed_modules = self._killed(hello, facts)
        if killed_modules is None:
            return
        lends = hello.wire_mode == "lent"
        with turns.slot():  # Merging is a computation like others.
            middle = Middle(
                self._served.base.model, cut, () if lends else groups, returns_tuple=self._served.trace.returns_tuple,
                factored=peer.factored, peer=peer, killed=killed_modules, pause=turns.pause, recomputes=lends and self._served.recomputes,
            )  # fmt: skip
            if lends:
                scalings = {module.name: module.scaling for module in hello.modules}
                modules = [LentModule(name, facts.modules[name], ranks[name], scalings[name]) for group in groups for name in group]
                peer.lent = LentAdapters(middle.view, hello.adapter_kind, modules, hello.dropout)
                self._adapter_codec = hello.adapter_codec
        # What was merged is in this session's own weights, which others do not have.
        alone = peer.lent is None or any(module.merge for module in killed_modules)
        lane = Lane(middle, cut, middle.killed | (peer.lent.pairs if peer.lent else {}), turns, None if alone else self._served.batcher)
        try:
            while self._exchange(peer, middle, lane, turns):
                self._count(peer, turns)
        finally:
            middle.close()

    def _killed(self, hello: Any, facts: HostFacts) -> list[KilledModule] | None:
        """The adapters of killed modules, which the device sends once; None where it said goodbye."""
        modules = [module for module in hello.modules if module.killed]
        if not modules:
            return []
        self._stream.transport.left_seconds = self._served.idle_seconds
        message = self._stream.receive()
        if message.kind != "killed":
            return None
        sizes = [(facts.modules[module.name], module.rank) for module in modules]
        check_shapes(message, [shape for (d_in, d_out), rank in sizes for shape in ((rank, d_in), (d_out, rank))])
        matrices = iter(tensors_of(message, torch.float32, torch.device("cpu")))
        adapters = [ModuleAdapter(next(matrices), next(matrices), module.scaling) for module in modules]
        return [
            KilledModule(module.name, hello.adapter_kind, adapter, module.killed == "merge")
            for module, adapter in zip(modules, adapters, strict=True)
        ]

    def _refuse(self, refusal: Any) -> None:
        self._figures.refusal = refusal
        with suppress(AtollError):  # The device stopped listening, or the dialogue is over: then there is nobody to tell.
            self._stream.send(refusal)

    def _exchange(self, peer: DevicePeer, middle: Middle, lane: Lane, turns: Turns) -> bool:
        """The next exchange, of which nothing is held when this returns; False where the device said goodbye."""
        transport = self._stream.transport
        silence = transport.left_seconds = min(self._served.idle_seconds, self._silence_seconds)
        message = self._stream.receive()
        self._silence_seconds -= silence - transport.left_seconds
        if message.kind != "forward":
            return False
        transport.left_seconds = self._served.exchange_seconds
        request, model = message.body, self._served.base.model
        layout = self._layout(request)
        peer.exchange, peer.num_tokens, peer.num_positions = request.exchange, sum(layout.lengths), request.rows * request.positions
        shapes = [(peer.num_tokens, self._served.width), *(peer.factor_shapes() if request.has_factors else [])]
        check_shapes(message, shapes)
        over = self._admit(peer.num_positions)
        if over is not None:
            self._refuse(over.refusal())
            return False
        try:
            (h_ND,) = tensors_of(message, model.dtype, model.device, slice(1))
            self._take_factors(peer, middle, message, train=request.train)
            kept = self._rows(request, middle)
            if request.follows and kept is None:
                peer.send(pb.Hidden(exchange=peer.exchange, evicted=True), [])
                return True
            asked = Pass(
                layout, request.positions, request.train, request.train and request.want_front_gradient, request.checkpoint,
                request.generator, kept,
            )  # fmt: skip
            lane.announce(h_ND, asked)
            with turns.slot():
                transport.waiting = turns.release
                hidden_ND, generator = lane.forward(h_ND, asked)
                is_kept = kept is not None and self._kept.put(kept)
                peer.send(pb.Hidden(exchange=peer.exchange, generator=generator, kept=is_kept), [hidden_ND])
                shape = tuple(hidden_ND.shape)
                del hidden_ND  # Not to be held while the device computes.
                if request.train:
                    message, grad_ND = peer.receive_gradient(shape, lane.announce_backward)
                    self._finish(peer, lane.backward(grad_ND), message.body.want_factor_gradients)
        finally:
            transport.waiting = nullcontext
            lane.clear()
            self._served.while_waiting()
        return True

    def _rows(self, request: Any, middle: Middle) -> KeptRows | None:
        """What the exchange's positions are added to; None where nothing is to be kept, or can be, or what they follow was driven out."""
        if request.follows:
            return self._kept.take()
        if request.train or request.has_factors or request.keep:
            self._kept.clear()
        keeps = request.keep and self._served.shelf.most_bytes > 0 and middle.can_keep
        return KeptRows.of(self._served.base.model, request.rows) if keeps else None

    def _take_factors(self, peer: DevicePeer, middle: Middle, message: Message, *, train: bool) -> None:
        model, factors = self._served.base.model, slice(1, None)
        if peer.lent is None:
            middle.take_factors(tensors_of(message, model.dtype, model.device, factors))
            return
        if message.body.has_factors:  # In their own precision, whatever the base has.
            peer.lent.take(tensors_of(message, torch.float32, model.device, factors))
        peer.lent.train(train)

    def _finish(self, peer: DevicePeer, front_ND: Tensor | None, wants_factor_gradients: bool) -> None:
        front = [] if front_ND is None else [front_ND]
        grads = peer.lent.give_back() if wants_factor_gradients and peer.lent is not None else []
        codecs = [self._stream.codec] * len(front) + [self._adapter_codec] * len(grads)
        peer.send(pb.Finished(exchange=peer.exchange), [*front, *grads], codecs)

    def _layout(self, request: Any) -> Layout:
        """The layout of a request whose sizes the dialogue has checked.

        Raises: ProtocolError for positions that the base does not have.
        """
        context = getattr(self._served.base.model.config.get_text_config(), "max_position_embeddings", None)
        places = torch.tensor(request.position_ids, dtype=torch.int64)
        positions = request.follows + request.positions
        if (context is not None and positions > context) or bool((places >= request.positions).any()):
            raise ProtocolError(
                "positions that the base does not have", got=f"rows of {positions}", expected=f"at most {context}",
                do="lower data.max_length",
            )  # fmt: skip
        lengths, wanted = tuple(request.lengths) or (request.positions,) * request.rows, torch.tensor(request.wanted, dtype=torch.int64)
        at = places.view(request.rows, request.positions) if len(places) else None
        return Layout(lengths, wanted if len(wanted) else None, at)

    def _count(self, peer: DevicePeer, turns: Turns) -> None:
        figures = self._figures
        figures.num_tokens += peer.num_tokens
        figures.num_positions += peer.num_positions
        figures.num_exchanges += 1
        figures.on_tokens(peer.num_tokens)
        self._count_use(turns)

    def _count_use(self, turns: Turns) -> None:
        self._figures.received_bytes = self._stream.received_bytes.total()
        self._figures.sent_bytes = self._stream.sent_bytes.total()
        self._figures.compute_seconds, self._figures.wait_seconds = turns.seconds, turns.waited


class _Boundary:
    """A context in which every exception ends: `refuse` tells the device of it, the host's log of faults of its own."""

    def __init__(self, refuse: Callable[[Any], None]) -> None:
        self._refuse = refuse

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> bool:
        match problem:
            case HostLostError():
                pass  # The device is gone, and nobody is left to be told.
            case AtollError():
                self._refuse(pb.Refusal(
                    code="frame" if isinstance(problem, FrameError) else "dialogue", field=problem.what, host_value=problem.expected,
                    device_value=problem.got, do=problem.do,
                ))  # fmt: skip
            case BaseException() if not isinstance(problem, KeyboardInterrupt):  # What was compiled panics past Exception.
                lines = "".join(traceback.format_exception(problem)).splitlines()
                log.error("a session fails\n%s", "\n".join(map(printable, lines)))
                self._refuse(pb.Refusal(code="failed", do="look into the host's log"))
        return problem is not None and not isinstance(problem, KeyboardInterrupt)
