"""The host receives activations, and no token, label or text of the device's data."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import pytest
import torch

from atoll.split.counted_stream import Transport
from atoll.split.cut import Cut
from atoll.tasks.batches import Batch
from atoll.training.trainer import FitPlan, TrainState

from tests.conftest import random_model
from tests.pieces import Steps, adapters, stream
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

STEPS = 3
RUN = 6
"""So many tokens in a row are looked for: fewer may come about by chance."""


class Recording:
    """A transport that keeps what goes to the host."""

    def __init__(self, inner: Transport, kept: list[bytes]) -> None:
        self.inner, self.kept = inner, kept

    def write(self, frame: bytes) -> None:
        self.kept.append(frame)
        self.inner.write(frame)

    def read(self) -> bytes:
        return self.inner.read()

    def close(self) -> None:
        self.inner.close()


def encodings(values: Sequence[int]) -> Iterator[bytes]:
    """Whole numbers in every way in which a program would write them; ids here are below 128, so one byte is also their varint."""
    for letter in "bhiqfd":
        yield struct.pack(f"<{len(values)}{letter}", *values)
    yield " ".join(map(str, values)).encode()
    yield ",".join(map(str, values)).encode()


def windows(batches: Sequence[Batch]) -> Iterator[list[int]]:
    """Runs of tokens and of labels of the data."""
    for batch in batches:
        for row, length in zip(batch.input_ids_BT.tolist(), batch.lengths, strict=True):
            yield from (row[start : start + RUN] for start in range(length - RUN + 1))
        labels = batch.target_N.tolist()
        yield from (labels[start : start + RUN] for start in range(0, len(labels) - RUN + 1))


@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_no_tokens_and_no_labels(mode: str, codec: str, batching: str) -> None:
    kept: list[bytes] = []
    connect = thread_host(served(random_model("llama", BLOCKS)))
    trainer, _ = device_trainer("llama", Cut(1, 0), lambda: Recording(connect(), kept), mode=mode, codec=codec)
    data = stream(batching=batching)
    trainer.fit(TrainState(adapters(random_model("llama", BLOCKS)), {}, 0), data, FitPlan(STEPS, 1, False), Steps([]))
    heard = b"".join(kept)
    wanted = [data.batch(step) for step in range(STEPS)]
    found = [values for values in windows(wanted) for way in encodings(values) if way in heard]
    assert not found
    assert len(heard) > 10_000


def test_the_search_finds_what_is_there() -> None:
    """The control: ids put into a frame in any of these ways would be found, and embeddings that travel with cut (0, 0) are found."""
    batch = stream().batch(0)
    ids = next(iter(windows([batch])))
    for way in encodings(ids):
        assert any(other in b"..." + way + b"..." for other in encodings(ids))
    kept: list[bytes] = []
    connect = thread_host(served(random_model("llama", BLOCKS)))
    trainer, _ = device_trainer("llama", Cut(0, 0), lambda: Recording(connect(), kept))
    trainer.fit(TrainState(adapters(random_model("llama", BLOCKS)), {}, 0), stream(), FitPlan(1, 1, False), Steps([]))
    embedding_VD = random_model("llama", BLOCKS).get_input_embeddings().weight
    sent = embedding_VD[int(batch.input_ids_BT[0, 0])].detach().to(torch.float32).numpy().tobytes()
    assert sent in b"".join(kept)
