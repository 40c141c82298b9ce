"""Greedy completions of prompts, in batches that change nothing about the result.

Shape suffixes: B prompts, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from atoll.base.head import head_of
from atoll.errors import BadValueError
from atoll.remote_blocks import Layout, RemoteBlocksPlaceholder, find_placeholder
from atoll.tasks.tokens import pad_id


def generate_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """The most likely next token again and again, until an end token or `max_new_tokens`; the text without special tokens.

    A prompt that does not fit into the model's context together with its completion loses its beginning.

    Raises: BadValueError where `max_new_tokens` leaves no room for a prompt.
    """
    room = _room(model, max_new_tokens)
    fitted = [list(prompt)[-room:] if room else list(prompt) for prompt in prompts]
    order = sorted(range(len(fitted)), key=lambda i: len(fitted[i]))
    texts = [""] * len(fitted)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, text in zip(chosen, _complete(model, tokenizer, [fitted[i] for i in chosen], max_new_tokens), strict=True):
            texts[i] = text
    return texts


def _complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    fill, remote_blocks = pad_id(tokenizer), find_placeholder(model)
    if remote_blocks is not None:
        begun = [list(prompt) or [fill] for prompt in prompts]
        rows = _complete_remotely(model, remote_blocks, begun, fill, _end_ids(model, tokenizer), max_new_tokens)
        return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    width = max(1, *(len(prompt) for prompt in prompts))
    # Left padding, so that every prompt ends where generation begins; an empty prompt starts from one end-of-text token.
    rows = [list(prompt) or [fill] for prompt in prompts]
    input_ids_BT = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    ends = _end_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=fill, use_cache=True
    )
    with torch.no_grad(), _plain_defaults(model):
        generate: Any = model.generate
        out_BT: torch.Tensor = generate(input_ids=input_ids_BT, attention_mask=mask_BT, generation_config=config)
    return [str(tokenizer.decode(_until_end(row[width:], ends), skip_special_tokens=True)) for row in out_BT.tolist()]


@torch.no_grad()
def _complete_remotely(
    model: PreTrainedModel, remote_blocks: RemoteBlocksPlaceholder, rows: list[list[int]], fill: int, ends: list[int], max_new_tokens: int
) -> list[list[int]]:
    """The same where blocks run in another process, which keeps no keys and values between tokens: each token reads its whole row again."""
    starts, head = [len(row) for row in rows], head_of(model)
    open_rows = list(range(len(rows)))
    for _ in range(max_new_tokens):
        lengths = tuple(len(rows[i]) for i in open_rows)
        width = max(lengths)
        input_ids_BT = torch.tensor([rows[i] + [fill] * (width - len(rows[i])) for i in open_rows], device=model.device)
        last_B = torch.tensor([place * width + length - 1 for place, length in enumerate(lengths)], device=model.device)
        with remote_blocks.expect(Layout(lengths, last_B)):
            h_BTD = model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        for i, token_id in zip(open_rows, head.logits(h_BTD.flatten(0, 1)[last_B]).argmax(-1).tolist(), strict=True):
            rows[i].append(token_id)
        open_rows = [i for i in open_rows if rows[i][-1] not in ends]
        if not open_rows:
            break
    return [_until_end(row[start:], ends) for row, start in zip(rows, starts, strict=True)]


def _until_end(token_ids: list[int], ends: list[int]) -> list[int]:
    return token_ids[: next((i for i, token_id in enumerate(token_ids) if token_id in ends), len(token_ids))]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and those that the model's own settings add (chat models end turns with another one)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(token_id for token_id in (tokenizer.eos_token_id, *several) if token_id is not None))


@contextmanager
def _plain_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Without the sampling settings and penalties that models bring along: they would change what greedy means."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _room(model: PreTrainedModel, max_new_tokens: int) -> int:
    """Tokens that a prompt may have; 0 where the model sets no limit."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return 0
    if max_new_tokens >= context:
        raise BadValueError(
            "the completion leaves no room for a prompt", where="[evaluate] max_new_tokens", got=str(max_new_tokens),
            expected=f"less than the {context} tokens of the model's context", do="use a smaller number",
        )  # fmt: skip
    return int(context) - max_new_tokens
