"""A host and a device in one process, joined by threads instead of sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from atoll.base.blocks import Skip, blocks_path, hear_hidden_states_only, sizes_of, trace
from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.split.counted_stream import CountedStream, Transport
from atoll.split.cut import Cut
from atoll.split.device.blocks import RemoteBlocks
from atoll.split.device.client import Client, Terms
from atoll.split.host.blocks.kept import Shelf
from atoll.split.host.compute_queue import ComputeQueue
from atoll.split.host.session import HostSession, Served, SessionFigures
from atoll.split.transport import ThreadTransport
from atoll.training.local_trainer import LocalTrainer
from atoll.wire.dialogue import Dialogue
from atoll.wire.handshake import PROTOCOL, HostFacts

from tests.conftest import random_model

BLOCKS = 3


def middle_sizes(model: PreTrainedModel, cut: Cut) -> dict[str, tuple[int, int]]:
    """The modules that a host runs for this cut."""
    path, groups = blocks_path(model), trace(model).groups
    blocks: Any = model.get_submodule(path)
    inside = range(cut.front, len(blocks) - cut.back)
    names = [name for group in groups for name in group if int(name.removeprefix(path + ".").split(".")[0]) in inside]
    return {name: sizes_of(model.get_submodule(name)) for name in names}


def served(
    model: PreTrainedModel, compute_queue: ComputeQueue | None = None, *, recomputes: bool = False, cache_bytes: int = 0
) -> Served:  # fmt: skip
    """A host of this model."""
    blocks: Any = model.get_submodule(blocks_path(model))

    def facts(cut: Cut) -> HostFacts:
        return HostFacts(
            PROTOCOL, "test", "tokenizer", len(blocks), middle_sizes(model, cut), ("fp32", "bf16", "fp16", "int8"),
            ("dense", "factored", "lent"), "fp32", ("lora", "bottleneck"), 4096, 64, ("offload", "merge"),
        )  # fmt: skip

    base, queue = Base("host", model, None, False), compute_queue or ComputeQueue()  # type: ignore[arg-type]
    return Served(base, "", trace(model), facts, lambda cut: "base", 32, 60.0, queue, recomputes, shelf=Shelf(cache_bytes))


def thread_host(host: Served) -> Callable[[], Transport]:
    """Opens sessions on the host, each in a thread of its own."""

    def connect() -> Transport:
        near, far = ThreadTransport.pair()
        stream = CountedStream(Dialogue("host"), far, "fp32")
        threading.Thread(target=HostSession(host, stream, SessionFigures("s", "")).run, daemon=True).start()
        return near

    return connect


def device_trainer(
    family: str | PreTrainedModel, cut: Cut, transport: Callable[[], Transport], *, kind: str = "lora", mode: str = "dense",
    codec: str = "fp32", edge: str = "north", total_steps: int = 20, patience: float = 0.0, dropout: float = 0.0,
    adapter_codec: str = "fp32", **train: object,
) -> tuple[LocalTrainer, Client]:  # fmt: skip
    """A trainer on a model whose middle blocks are gone."""
    model = random_model(family, BLOCKS) if isinstance(family, str) else family
    sizes, traced = middle_sizes(model, cut), trace(model)
    terms = Terms(
        "test", "base", "tokenizer", cut, kind, mode, codec, "fp32", 512, int(model.config.hidden_size), adapter_codec  # type: ignore[arg-type]
    )
    client = Client("test", terms, transport, patience)
    blocks: Any = model.get_submodule(blocks_path(model))
    remote = RemoteBlocks(
        sizes, returns_tuple=traced.returns_tuple, keeps_back=cut.back > 0, connect=client.connect, retrying=client.retrying
    )
    client.blocks = remote
    for number in range(cut.front, len(blocks) - cut.back):
        blocks[number] = Skip(traced.returns_tuple)
    blocks[cut.front] = remote
    hear_hidden_states_only(remote)
    base = Base("device", model, None, False)  # type: ignore[arg-type]
    settings = Train(learning_rate=2e-3, **train)  # type: ignore[arg-type]
    return LocalTrainer(base, settings, total_steps, dropout, 0, edge, client.retrying), client
