"""Batches: every example once an epoch, any step at any time, and the losses that each document has alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from atoll.base.head import token_losses_N
from atoll.errors import EmptyDataError, UnavailableError
from atoll.tasks.batches import Batch, BatchStream, check_packing, pack_batch, pad_batch, supports_packing
from atoll.tasks.packing import best_fit
from atoll.tasks.tokens import Example, Examples

from tests.conftest import random_model

Batching = Literal["bucket", "pack", "shuffle"]
KINDS: tuple[Batching, ...] = ("bucket", "pack", "shuffle")


def examples_of(lengths: list[int], max_length: int = 32) -> Examples:
    random = np.random.default_rng(1)
    items = []
    for number, length in enumerate(lengths):
        token_ids = random.integers(3, 96, length).astype(np.int32)
        token_ids[0] = 3 + number % 90
        mask = np.arange(length) >= max(1, length // 2)
        items.append(Example(token_ids, mask))
    return Examples(tuple(items), np.arange(len(items)), np.zeros(len(items), dtype=bool), 0, max_length)


def stream(examples: Examples, batching: Batching, batch_size: int = 4, seed: int = 0, edge: str = "a") -> BatchStream:
    return BatchStream(examples, batch_size, seed, edge, batching, 0)


def labels_of(batches: list[Batch]) -> list[int]:
    return sorted(token for batch in batches for token in batch.target_N.tolist())


@pytest.mark.parametrize("batching", KINDS)
@given(lengths=st.lists(st.integers(2, 32), min_size=1, max_size=70), batch_size=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_an_epoch_holds_every_example_once(batching: Batching, lengths: list[int], batch_size: int) -> None:
    examples = examples_of(lengths)
    batches = stream(examples, batching, batch_size)
    for epoch in (0, 3):
        whole = [batches.batch(epoch * batches.batches_per_epoch + i) for i in range(batches.batches_per_epoch)]
        assert sum(batch.num_tokens for batch in whole) == examples.num_tokens
        assert all(batch.num_label_tokens > 0 for batch in whole)
        assert all(len(batch.input_ids_BT) <= batch_size and batch.input_ids_BT.shape[1] <= 32 for batch in whole)
        assert labels_of(whole) == sorted(int(t) for example in examples for t in example.token_ids[example.loss_mask])


@pytest.mark.parametrize("batching", KINDS)
def test_a_batch_is_a_function_of_its_step(batching: Batching) -> None:
    examples = examples_of([2 + i % 17 for i in range(50)])
    forward, backward = stream(examples, batching), stream(examples, batching)
    steps = range(3 * forward.batches_per_epoch)
    ids = {step: forward.batch(step).input_ids_BT for step in steps}
    assert all(torch.equal(ids[step], backward.batch(step).input_ids_BT) for step in reversed(steps))
    others = stream(examples, batching, edge="b"), stream(examples, batching, seed=1)
    for other in others:
        assert any(
            not torch.equal(ids[step], other.batch(step).input_ids_BT)
            for step in steps
            if ids[step].shape == other.batch(step).input_ids_BT.shape
        )
    epoch = forward.batches_per_epoch
    assert any(ids[step].shape != ids[step + epoch].shape or not torch.equal(ids[step], ids[step + epoch]) for step in range(epoch))


def test_bucketing_pads_less() -> None:
    examples = examples_of([int(n) for n in np.random.default_rng(0).integers(2, 33, 256)])

    def padding(batching: Batching) -> int:
        batches = stream(examples, batching, 8)
        return sum(batch.input_ids_BT.numel() - batch.num_tokens for batch in map(batches.batch, range(batches.batches_per_epoch)))

    assert padding("bucket") < padding("shuffle") / 3
    assert padding("pack") < padding("shuffle") / 3


def test_no_examples() -> None:
    with pytest.raises(EmptyDataError):
        stream(examples_of([]), "bucket")


@given(st.lists(st.integers(1, 20), max_size=60))
@settings(max_examples=50, deadline=None)
def test_best_fit_fits(lengths: list[int]) -> None:
    sequences = best_fit(lengths, 20)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in sequence) <= 20 for sequence in sequences)
    # No two sequences could be one: each would have taken the other's documents.
    loads = sorted(sum(lengths[i] for i in sequence) for sequence in sequences)
    assert len(loads) < 2 or loads[0] + loads[1] > 20


def alone_N(model: PreTrainedModel, examples: Examples) -> torch.Tensor:
    """The library's own forward pass and cross-entropy, document by document."""
    losses = []
    for example in examples:
        ids = torch.from_numpy(example.token_ids.astype(np.int64))
        loss = nn.functional.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")
        losses.append(loss[torch.from_numpy(example.loss_mask[1:])])
    return torch.cat(losses)


def test_padding_on_the_right_needs_no_mask(family_model: PreTrainedModel) -> None:
    examples = examples_of([7, 3, 12, 2])
    batch = pad_batch(examples, 0)
    mask_BT = torch.arange(12) < torch.tensor([[len(example)] for example in examples])
    masked_BTV = family_model(batch.input_ids_BT, attention_mask=mask_BT.long()).logits
    masked_N = nn.functional.cross_entropy(masked_BTV.flatten(0, 1)[batch.predict_N].float(), batch.target_N, reduction="none")
    assert batch.attention_B1TT is None
    torch.testing.assert_close(token_losses_N(family_model, batch), masked_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(token_losses_N(family_model, batch), alone_N(family_model, examples), atol=1e-5, rtol=0)


def test_packed_documents_have_the_losses_they_have_alone(family: str, family_model: PreTrainedModel) -> None:
    if family == "bloom":
        assert not supports_packing(family_model, 32)
        with pytest.raises(UnavailableError) as caught:
            check_packing(family_model, 32)
        assert "bucket" in caught.value.do
        return
    assert supports_packing(family_model, 32)
    check_packing(family_model, 32)
    examples = examples_of([7, 3, 12, 2, 9])
    batch = pack_batch([examples[:3], examples[3:]], 0)
    assert batch.input_ids_BT.shape == (2, 22)
    torch.testing.assert_close(token_losses_N(family_model, batch), alone_N(family_model, examples), atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packing_does_not_depend_on_the_attention_implementation(implementation: str) -> None:
    model = AutoModelForCausalLM.from_config(random_model("llama").config, attn_implementation=implementation).eval()
    examples = examples_of([7, 3, 12])
    torch.testing.assert_close(token_losses_N(model, pack_batch([examples], 0)), alone_N(model, examples), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "window", "exact"), [("mistral", 16, False), ("mistral", 32, True), ("gemma2", 16, False), ("qwen2", 16, True)]
)
def test_windows_narrower_than_the_rows_cannot_be_packed(family: str, window: int, exact: bool) -> None:
    """Qwen2 has a window in its configuration that is switched off."""
    config = random_model(family).config
    config.sliding_window = window if family != "qwen2" else None
    assert supports_packing(AutoModelForCausalLM.from_config(config).eval(), 32) is exact
