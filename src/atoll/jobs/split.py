"""Put split mode together: a base made ready for a host to serve, a device's part of one joined to its host, or fetched from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import get_args

import grpc
import torch
from transformers import PreTrainedTokenizerBase

from atoll.adapters.attach import attached
from atoll.adapters.killed import Killed
from atoll.adapters.state import AdapterState
from atoll.base.blocks import blocks_path, sizes_of, trace
from atoll.base.load import Base
from atoll.base.part import load_part, part_digest
from atoll.base.weights.beside import tokenizer_digest
from atoll.config.load import LoadedConfig, changed
from atoll.config.schema import RunConfig, Wire
from atoll.errors import BadValueError
from atoll.heap import give_freed_pages_back
from atoll.registry.parts import names
from atoll.remote_blocks import RemoteBlocksPlaceholder
from atoll.split.authority.revocation import Revoked
from atoll.split.certificates import HostAccess as HostAccess
from atoll.split.certificates import open_channel
from atoll.split.counted_stream import Transport
from atoll.split.cut import Cut
from atoll.split.device.base_part import fetch_part
from atoll.split.device.blocks import RemoteBlocks
from atoll.split.device.client import Client, Terms
from atoll.split.host.audit import Audit
from atoll.split.host.blocks.batching import Batcher
from atoll.split.host.blocks.kept import Shelf
from atoll.split.host.blocks.middle import Middle, shared_view
from atoll.split.host.compute_queue import ComputeQueue
from atoll.split.host.server import Host
from atoll.split.host.session import Served
from atoll.split.host.tenants import HostLimits
from atoll.split.transport import ClientTransport, SlowLink, SlowTransport
from atoll.units import counted
from atoll.wire.byte_formulas import WireMode
from atoll.wire.handshake import PROTOCOL, HostFacts, block_of

Sizes = Mapping[str, tuple[int, int]]
MAX_RANK = 1024


@dataclass(frozen=True, slots=True, eq=False)
class SplitSide:
    """A device's part of the base, joined to a host."""

    base: Base
    client: Client
    blocks: RemoteBlocks
    channel: grpc.Channel

    def close(self) -> None:
        """Say goodbye to the host."""
        self.client.end()
        self.channel.close()


def check_access(host: object) -> None:
    """Whether this says how a host is reached, or is None. Raises: BadValueError."""
    if host is not None and not isinstance(host, HostAccess):
        raise BadValueError(
            "host has to say how a host is reached", where="host", got=repr(host)[:100], expected="an atoll.HostAccess, or None",
            do='give atoll.HostAccess("HOST:PORT"), with an atoll.DeviceTls where the host has certificates',
        )  # fmt: skip


def serve(base: Base, source: str, precision: str, bits: int, limits: HostLimits, codecs: Sequence[str] = ()) -> Served:
    """A base made ready to be served, in these codecs beside those that ship; adapters attached to it later do not show in it."""
    base = replace(base, model=shared_view(base.model))  # type: ignore[arg-type]
    traced = trace(base.model)
    num_blocks = len(base.model.get_submodule(blocks_path(base.model)))  # type: ignore[arg-type]
    sizes = {name: sizes_of(base.model.get_submodule(name)) for group in traced.groups for name in group}
    tokenizer, said_of_tokenizer, one_at_a_time = tokenizer_digest(base.tokenizer), _said_of(base.tokenizer), Lock()

    @cache
    def digest(cut: Cut) -> str:
        return part_digest(source, cut.front, cut.back)

    def base_digest(cut: Cut) -> str:
        with one_at_a_time:  # Else two that ask at once would both read the base.
            return digest(cut)

    def facts(cut: Cut) -> HostFacts:
        middle = range(cut.front, num_blocks - cut.back)
        return HostFacts(
            protocol=PROTOCOL, atoll_version=version("atoll"), tokenizer_digest=tokenizer, num_blocks=num_blocks,
            modules={name: size for name, size in sizes.items() if block_of(name) in middle},
            codecs=tuple(dict.fromkeys((*names("codec"), *codecs))), wire_modes=get_args(WireMode), precision=precision,
            kinds=("lora", "bottleneck"),
            max_tokens=limits.max_tokens, max_rank=MAX_RANK, killed=("offload", "merge") if limits.merges and bits >= 16 else ("offload",),
            tokenizer=said_of_tokenizer,
        )  # fmt: skip

    queue = ComputeQueue(torch.cuda.synchronize) if base.model.device.type == "cuda" else ComputeQueue()

    def new_middle(cut: Cut, pause: Callable[[], None]) -> Middle:
        return Middle(base.model, cut, (), returns_tuple=traced.returns_tuple, factored=False, peer=None, pause=pause)

    batcher = Batcher(new_middle, limits.max_tokens) if limits.batches else None
    return Served(
        base, source, traced, facts, base_digest, bits, limits.idle_seconds, queue, limits.recomputes, batcher, limits.exchange_seconds,
        limits.silence_seconds, Shelf(limits.cache_bytes),
        # Who asks for it is short of memory, and what each session leaves free between the others' buffers adds up.
        give_freed_pages_back if limits.recomputes else lambda: None,
    )  # fmt: skip


def start_host(
    served: Served, limits: HostLimits, listen: str, credentials: grpc.ServerCredentials | None, audit: Audit | None = None,
    revoked: Revoked | None = None,
) -> Host:  # fmt: skip
    """A host that listens."""
    host = Host(served, limits, listen, credentials, audit, revoked)
    host.start()
    return host


def join(base_name: str, config: RunConfig, access: HostAccess, max_tokens: int) -> SplitSide:
    """A device's part of the base, joined to the host; the first session opens with the first batch.

    Raises: what load_part raises; TransportError where the connection would not be safe.
    """
    cut, wire = Cut(config.model.cut.front, config.model.cut.back), config.wire
    channel = open_channel(access.address, access.tls, insecure=access.insecure)
    made: list[RemoteBlocks] = []
    clients: list[Client] = []

    def transport() -> Transport:
        plain = ClientTransport(channel, wire.timeout)
        if wire.link_bandwidth is None and not wire.link_latency:
            return plain
        return SlowTransport(plain, SlowLink(wire.link_bandwidth, wire.link_latency))

    def remote_blocks(sizes: Sizes, returns_tuple: bool) -> RemoteBlocksPlaceholder:
        # The terms hold digests of what is loaded only after this; the client is made last and looked up when the first batch comes.
        blocks = RemoteBlocks(
            sizes, returns_tuple=returns_tuple, keeps_back=cut.back > 0, connect=lambda adapters: clients[0].connect(adapters),
            retrying=lambda attempt: clients[0].retrying(attempt),
        )
        made.append(blocks)
        return blocks

    base = load_part(base_name, cut.front, cut.back, precision=config.model.precision, remote_blocks=remote_blocks)
    (blocks,) = made
    terms = Terms(
        atoll_version=version("atoll"), base_digest=part_digest(base_name, cut.front, cut.back),
        tokenizer_digest=tokenizer_digest(base.tokenizer), cut=cut, kind=config.adapter.kind, mode=scoring_mode(wire), codec=wire.codec,
        precision=config.model.precision, max_tokens=max_tokens,
        d_model=int(base.model.config.get_text_config().hidden_size), adapter_codec=wire.adapters,
        chosen=wire.mode == "auto", tokenizer=_said_of(base.tokenizer),
    )  # fmt: skip
    client = Client(access.address, terms, transport, wire.reconnect)
    client.on_lost = client.on_held = lambda reason: access.tell(f"host {access.address}: {reason}")
    client.blocks = blocks
    clients.append(client)
    return SplitSide(base, client, blocks, channel)


def _said_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells one tokenizer from another, for people."""
    return f"{type(tokenizer).__name__}, {counted(len(tokenizer), 'token')}, sha256 {tokenizer_digest(tokenizer)[:12]}"


def scoring_mode(wire: Wire) -> WireMode:
    """In which held-out rows are scored, and text is generated: "auto" is one round trip a batch."""
    return "lent" if wire.mode == "auto" else wire.mode


def greet(config: RunConfig, split: SplitSide, start: AdapterState, modes: Set[WireMode | None], *, scores: bool) -> None:
    """Open a session of every kind that a run in these modes will need: what the host refuses is found out before anything is written.

    Raises: HostRefusedError, HostLostError, ProtocolError.
    """
    for mode in sorted({mode for mode in modes if mode is not None} | ({scoring_mode(config.wire)} if scores else set())):
        split.client.use(mode)
        for killed in (Killed(), *([Killed(tuple(start.modules), "merge")] if config.select.merges else [])):
            with attached(split.base.model, start, killed=killed):
                split.blocks.open()


def with_fetched_base(loaded: LoadedConfig, access: HostAccess, folder: Path) -> LoadedConfig:
    """The config with its base in `folder`, which is fetched from the host where it is not there yet.

    Raises: TransportError, HostLostError, HostRefusedError, FrameError, OutputError.
    """
    cut = loaded.config.model.cut
    if not folder.exists():
        with open_channel(access.address, access.tls, insecure=access.insecure) as channel:
            fetch_part(channel, Cut(cut.front, cut.back), folder)
    return changed(loaded, [f"model.base={folder.absolute()}"])
