"""Examples as tensors, batch by batch, in an order that a seed decides.

Shape suffixes: B rows, T positions, N label tokens, 1 one mask for all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atoll import seeding
from atoll.base.head import token_losses_N
from atoll.errors import EmptyDataError, UnavailableError
from atoll.tasks.packing import attention_mask, best_fit, documents_seen
from atoll.tasks.tokens import Example, Examples

WINDOW_BATCHES = 16
"""Rows are sorted by length within windows of so many batches: wide enough for little padding, narrow enough for chance."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one forward pass sees. Rows are padded on the right, where causal attention makes padding harmless without a mask.

    Shapes: input_ids_BT, position_ids_BT int64; predict_N flat positions (of B*T) whose next token carries loss; target_N these tokens;
    attention_B1TT fp32, added to attention scores. Of rows with classes: predict_N their last tokens, target_N the classes.
    """

    input_ids_BT: Tensor
    predict_N: Tensor
    target_N: Tensor
    position_ids_BT: Tensor | None
    attention_B1TT: Tensor | None
    lengths: tuple[int, ...]
    """Tokens of each row; padding follows them."""

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)

    @property
    def num_label_tokens(self) -> int:
        """Tokens that carry loss."""
        return self.predict_N.numel()

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        if self.input_ids_BT.device == device:
            return self
        names = ("input_ids_BT", "predict_N", "target_N", "position_ids_BT", "attention_B1TT")
        moved = {name: tensor.to(device) for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **moved)


def pad_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """One example to a row."""
    width = max(len(example) for example in examples)
    input_ids_BT = np.full((len(examples), width), pad_id, dtype=np.int64)
    for row, example in enumerate(examples):
        input_ids_BT[row, : len(example)] = example.token_ids
    lengths, labels = [len(example) for example in examples], [example.label for example in examples if example.label is not None]
    if labels:
        last_N = torch.tensor([row * width + length - 1 for row, length in enumerate(lengths)])
        return Batch(torch.from_numpy(input_ids_BT), last_N, torch.tensor(labels), None, None, tuple(lengths))
    predict_N = np.concatenate([row * width + np.flatnonzero(example.loss_mask) - 1 for row, example in enumerate(examples)])
    return _batch(input_ids_BT, predict_N, lengths)


def pack_batch(sequences: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Several examples to a row; none sees another, and none predicts another's first token."""
    width = max(sum(len(example) for example in sequence) for sequence in sequences)
    input_ids_BT = np.full((len(sequences), width), pad_id, dtype=np.int64)
    # Padding is a document of its own: a position that sees nothing at all would be undefined.
    document_BT = np.full((len(sequences), width), -1)
    position_ids_BT = np.zeros((len(sequences), width), dtype=np.int64)
    predict = []
    for row, sequence in enumerate(sequences):
        start = 0
        for number, example in enumerate(sequence):
            stop = start + len(example)
            input_ids_BT[row, start:stop] = example.token_ids
            document_BT[row, start:stop] = number
            position_ids_BT[row, start:stop] = np.arange(len(example))
            predict.append(row * width + start + np.flatnonzero(example.loss_mask) - 1)
            start = stop
    lengths = [sum(len(example) for example in sequence) for sequence in sequences]
    plain = _batch(input_ids_BT, np.concatenate(predict), lengths)
    return replace(plain, position_ids_BT=torch.from_numpy(position_ids_BT), attention_B1TT=attention_mask(documents_seen(document_BT)))


class BatchStream:
    """An endless sequence of batches, each a pure function of its step: any step can be asked for, in any order, with the same answer.

    Raises: EmptyDataError where there is no example.
    """

    def __init__(
        self, examples: Examples, batch_size: int, seed: int, edge: str, batching: Literal["bucket", "pack", "shuffle"], pad_id: int
    ) -> None:
        if not len(examples):
            raise EmptyDataError(
                "an edge has nothing to train on", where=f"edge {edge}" if edge else "", got="0 examples", expected="at least one",
                do="give it data, or leave the edge out",
            )  # fmt: skip
        self._examples, self._batch_size, self._batching, self._pad_id = examples, batch_size, batching, pad_id
        self._seed, self._edge = seed, edge
        self._lengths = np.array([len(example) for example in examples])
        # Which documents share a sequence does not matter, as they do not see each other; so it is decided once.
        self._sequences = best_fit(self._lengths.tolist(), examples.max_length) if batching == "pack" else []
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    @property
    def batches_per_epoch(self) -> int:
        """Batches that together hold every example once; the last may be smaller."""
        return -(-(len(self._sequences) or len(self._examples)) // self._batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of one step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        chosen = self._epoch[1][place]
        if self._batching == "pack":
            return pack_batch([[self._examples[i] for i in self._sequences[number]] for number in chosen], self._pad_id)
        return pad_batch([self._examples[i] for i in chosen], self._pad_id)

    def _order(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng(seeding.stream(self._seed, "batches", edge=self._edge, round=epoch))
        order = random.permutation(len(self._sequences) or len(self._examples))
        if self._batching == "bucket":
            window = WINDOW_BATCHES * self._batch_size
            windows = [order[start : start + window] for start in range(0, len(order), window)]
            order = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in windows])
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        return batches if self._batching != "bucket" else [batches[i] for i in random.permutation(len(batches))]


def supports_packing(model: PreTrainedModel, max_length: int) -> bool:
    """Whether packed documents have the losses that they have alone, tried on the model itself.

    Not so with ALiBi as BLOOM has it, with recurrent state, or with an attention window below `max_length`, which the mask would override.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < max_length:
        return False
    random = np.random.default_rng(0)
    documents = [Example(random.integers(0, config.vocab_size, length, dtype=np.int32), np.arange(length) > 0) for length in (5, 7)]
    try:
        packed_N = token_losses_N(model, pack_batch([documents], 0).to(model.device))
    except (ValueError, RuntimeError, TypeError):
        return False  # BLOOM for one cannot take such a mask.
    alone_N = torch.cat([token_losses_N(model, pad_batch([document], 0).to(model.device)) for document in documents])
    return torch.allclose(packed_N, alone_N, rtol=0, atol=1e-4 if model.dtype == torch.float32 else 0.1)


def check_packing(model: PreTrainedModel, max_length: int) -> None:
    """Refuse packing where it would change the losses.

    Raises: UnavailableError.
    """
    if not supports_packing(model, max_length):
        raise UnavailableError(
            "rows cannot be packed for this model", where='[data] batching = "pack"', got=f"{type(model).__name__}",
            expected="a model whose attention takes a block mask and positions, without a window narrower than max_length",
            do='set batching = "bucket"',
        )  # fmt: skip


def _batch(input_ids_BT: np.ndarray, predict_N: np.ndarray, lengths: Sequence[int]) -> Batch:
    input_ids = torch.from_numpy(input_ids_BT)
    predict = torch.from_numpy(predict_N.astype(np.int64))
    # A label is never at the start of a row, so the position after a predicting one is in the same row.
    return Batch(input_ids, predict, input_ids.flatten()[predict + 1], None, None, tuple(lengths))
