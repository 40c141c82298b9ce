"""How likely a model finds each of several completions of one prompt.

Shape suffixes: B questions, T positions, N label tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from atoll.base.head import token_losses_N
from atoll.remote_blocks import find_placeholder
from atoll.tasks.batches import Batch, pad_batch, supports_packing
from atoll.tasks.packing import attention_mask
from atoll.tasks.tokens import Example


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A prompt and its candidate completions, as token ids."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(candidate) for candidate in self.candidates)

def log_likelihoods(model: PreTrainedModel, questions: Sequence[Question], *, batch_size: int, max_length: int) -> list[np.ndarray]:
    """For each question the total log-likelihood of each candidate, end token included, in nats.

    A prompt that does not fit beside its longest candidate loses its beginning: all candidates of a question see the same prompt.
    """
    fitted = [_fit(question, max_length) for question in questions]
    # A host knows rows and packed documents, not a prompt that several candidates share.
    shared = find_placeholder(model) is None and supports_packing(model, max_length)
    found: list[np.ndarray] = [np.empty(0)] * len(questions)
    for chosen in _groups([len(question) for question in fitted], batch_size if shared else 1, max_length):
        group = [fitted[i] for i in chosen]
        batch = shared_prompt_batch(group) if shared else _separate_batch(group)
        losses_N = token_losses_N(model, batch.to(model.device)).double().cpu().numpy()
        counts = [_num_scored(question, candidate) for question in group for candidate in question.candidates]
        sums = iter([float(-part.sum()) for part in np.split(losses_N, np.cumsum(counts)[:-1])])
        for i, question in zip(chosen, group, strict=True):
            found[i] = np.array([next(sums) for _ in question.candidates])
    return found


def shared_prompt_batch(questions: Sequence[Question]) -> Batch:
    """Each question as one row: the prompt once, then all candidates side by side, which see the prompt and themselves only."""
    width = max(len(question) for question in questions)
    input_ids_BT = np.zeros((len(questions), width), dtype=np.int64)
    part_BT = np.full((len(questions), width), -1)
    position_ids_BT = np.zeros((len(questions), width), dtype=np.int64)
    predict: list[int] = []
    target: list[int] = []
    for row, question in enumerate(questions):
        prompt_length = stop = len(question.prompt)
        input_ids_BT[row, :stop] = question.prompt
        part_BT[row, :stop] = 0
        position_ids_BT[row, :stop] = np.arange(stop)
        for number, candidate in enumerate(question.candidates, start=1):
            start, stop = stop, stop + len(candidate)
            input_ids_BT[row, start:stop] = candidate
            part_BT[row, start:stop] = number
            position_ids_BT[row, start:stop] = prompt_length + np.arange(len(candidate))
            # The first token of every candidate is predicted from the end of the prompt, the others from the token before.
            predict += [row * width + prompt_length - 1] * bool(prompt_length) + [row * width + t for t in range(start, stop - 1)]
            target += candidate[0 if prompt_length else 1 :]
    same = part_BT[:, :, None] == part_BT[:, None, :]
    seen_BTT = (same | (part_BT[:, None, :] == 0)) & np.tri(width, dtype=bool)
    as_tensor = torch.from_numpy
    return Batch(
        as_tensor(input_ids_BT), torch.tensor(predict), torch.tensor(target), as_tensor(position_ids_BT), attention_mask(seen_BTT),
        tuple(len(question) for question in questions),
    )  # fmt: skip


def _separate_batch(questions: Sequence[Question]) -> Batch:
    examples = []
    for question in questions:
        for candidate in question.candidates:
            token_ids = np.array(question.prompt + candidate, dtype=np.int32)
            examples.append(Example(token_ids, np.arange(len(token_ids)) >= max(len(question.prompt), 1)))
    return pad_batch(examples, 0)


def _num_scored(question: Question, candidate: tuple[int, ...]) -> int:
    return len(candidate) - (not question.prompt)


def _fit(question: Question, max_length: int) -> Question:
    longest = max(len(candidate) for candidate in question.candidates)
    room = max(max_length - longest, 1)
    return Question(question.prompt[-room:], tuple(candidate[: max_length - 1] for candidate in question.candidates))


def _groups(lengths: Sequence[int], batch_size: int, max_length: int) -> Iterator[list[int]]:
    """Questions of like length together, at most `batch_size` of them and about as many tokens as that many rows of `max_length`."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) == batch_size or (len(group) + 1) * lengths[i] > batch_size * max_length):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
