"""How likely a model finds each of several completions of one prompt.

Shape suffixes: B questions, T positions, N label tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atoll.base.head import token_losses_N
from atoll.remote_blocks import find_placeholder
from atoll.tasks.batches import Batch, pad_batch
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
    layout = _exact_layout(model, fitted, batch_size)
    found: list[np.ndarray] = [np.empty(0)] * len(questions)
    lengths = [len(question) for question in fitted]
    for chosen in _groups(lengths, batch_size if layout is shared_prompts else 1, max_length):
        group = [fitted[i] for i in chosen]
        losses_N = _losses_N(model, layout(group)).double().cpu().numpy()
        counts = [_num_scored(question, candidate) for question in group for candidate in question.candidates]
        sums = iter([float(-part.sum()) for part in np.split(losses_N, np.cumsum(counts)[:-1])])
        for i, question in zip(chosen, group, strict=True):
            found[i] = np.array([next(sums) for _ in question.candidates])
    return found


def shared_prompts(questions: Sequence[Question]) -> list[Batch]:
    """Each question as one row: the prompt once, then all candidates side by side, which see the prompt and themselves only."""
    return [shared_prompt_batch(questions)]


def padded(questions: Sequence[Question]) -> list[Batch]:
    """Each candidate behind its prompt as one row."""
    return [_separate_batch(questions)]


def alone(questions: Sequence[Question]) -> list[Batch]:
    """The same, each in a batch of its own: what the model says of it, whatever stands beside it."""
    return [
        _separate_batch([Question(question.prompt, (candidate,))]) for question in questions for candidate in question.candidates
    ]  # fmt: skip


def _exact_layout(model: PreTrainedModel, questions: Sequence[Question], batch_size: int) -> Callable[[Sequence[Question]], list[Batch]]:
    """The fastest layout in which the model says of these questions what it says of them alone, tried on the longest and the shortest.

    ALiBi and windows that count places in a row (MPT, GPT-Neo), recurrent state, and rotations that depend on the longest row of a batch
    (dynamic, longrope) rule layouts out. What goes wrong does so for the longest first.
    """
    picks = {
        max(range(len(questions)), key=lambda i: len(questions[i])): None,
        max(range(len(questions)), key=lambda i: len(questions[i].prompt) + max(map(len, questions[i].candidates))): None,
        min(range(len(questions)), key=lambda i: len(questions[i])): None,
    }
    tried = [questions[i] for i in picks]
    wanted_N = _losses_N(model, alone(tried))
    # A host knows rows, not a prompt that several candidates share.
    for layout in (shared_prompts, padded) if find_placeholder(model) is None else (padded,):
        size = batch_size if layout is shared_prompts else 1
        try:
            found = [_losses_N(model, layout(tried[start : start + size])) for start in range(0, len(tried), size)]
        except (ValueError, RuntimeError, TypeError):
            continue  # BLOOM for one cannot take such a mask.
        if torch.allclose(torch.cat(found), wanted_N, rtol=0, atol=1e-4 if model.dtype == torch.float32 else 0.1):
            return layout
    return alone


def _losses_N(model: PreTrainedModel, batches: Sequence[Batch]) -> Tensor:
    return torch.cat([token_losses_N(model, batch.to(model.device)) for batch in batches])


def shared_prompt_batch(questions: Sequence[Question]) -> Batch:
    """The batch of `shared_prompts`."""
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
