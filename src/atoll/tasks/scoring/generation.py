"""Greedy completions of prompts, in batches that change nothing about the result.

Shape suffixes: B prompts, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from atoll.base.head import head_of
from atoll.errors import BadValueError
from atoll.remote_blocks import Layout, RemoteBlocksPlaceholder, find_placeholder
from atoll.tasks.tokens import encode_texts, pad_id


@dataclass(frozen=True, slots=True)
class Ends:
    """What ends a completion: any of these tokens; and a text, where a chat template ends turns with one that is no token."""

    token_ids: tuple[int, ...]
    text: str = ""

    def said(self, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """What stands before the end, without special tokens."""
        stop = next((i for i, token_id in enumerate(token_ids) if token_id in self.token_ids), len(token_ids))
        text = str(tokenizer.decode(list(token_ids[:stop]), skip_special_tokens=True))
        return text.partition(self.text)[0] if self.text else text

    def reached(self, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the last token ends it."""
        return token_ids[-1] in self.token_ids or (bool(self.text) and self.text in str(tokenizer.decode(list(token_ids))))


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, closing: str = "") -> Ends:
    """The tokenizer's end token, those that the model's own settings add, and what a chat was trained to end with, which is `closing`."""
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    known = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    marks = [token_id for token_id in encode_texts([closing], tokenizer)[0] if token_id in known][:1]
    found = dict.fromkeys(int(token_id) for token_id in (tokenizer.eos_token_id, *several, *marks) if token_id is not None)
    return Ends(tuple(found), "" if marks else closing.strip())


def generate_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int,
    closing: str = "",
) -> list[str]:  # fmt: skip
    """The most likely next token again and again, until an end or `max_new_tokens`; the text without special tokens.

    An end is the tokenizer's or the model's, or `closing`, what a chat template writes behind an answer. A prompt that does not fit into
    the model's context together with its completion loses its beginning.

    Raises: BadValueError where `max_new_tokens` leaves no room for a prompt.
    """
    room = _room(model, max_new_tokens)
    fitted = [list(prompt)[-room:] if room else list(prompt) for prompt in prompts]
    ends = ends_of(model, tokenizer, closing)
    order = sorted(range(len(fitted)), key=lambda i: len(fitted[i]))
    texts = [""] * len(fitted)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, text in zip(chosen, _complete(model, tokenizer, [fitted[i] for i in chosen], max_new_tokens, ends), strict=True):
            texts[i] = text
    return texts


def _complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Ends
) -> list[str]:
    fill, remote_blocks = pad_id(tokenizer), find_placeholder(model)
    if remote_blocks is not None:
        begun = [list(prompt) or [fill] for prompt in prompts]
        rows = _complete_remotely(model, remote_blocks, begun, tokenizer, ends, max_new_tokens)
        return [ends.said(row, tokenizer) for row in rows]
    width = max(1, *(len(prompt) for prompt in prompts))
    # Left padding, so that every prompt ends where generation begins; an empty prompt starts from one end-of-text token.
    rows = [list(prompt) or [fill] for prompt in prompts]
    input_ids_BT = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=list(ends.token_ids) or None, pad_token_id=fill,
        use_cache=True, stop_strings=[ends.text] if ends.text else None,
    )  # fmt: skip
    with torch.no_grad(), _plain_defaults(model):
        generate: Any = model.generate
        out_BT: torch.Tensor = generate(input_ids=input_ids_BT, attention_mask=mask_BT, generation_config=config, tokenizer=tokenizer)
    return [ends.said(row[width:], tokenizer) for row in out_BT.tolist()]


@torch.no_grad()
def _complete_remotely(
    model: PreTrainedModel, remote_blocks: RemoteBlocksPlaceholder, rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, ends: Ends,
    max_new_tokens: int,
) -> list[list[int]]:  # fmt: skip
    """The same where blocks run in another process, which keeps no keys and values between tokens: each token reads its whole row again."""
    starts, head, fill = [len(row) for row in rows], head_of(model), pad_id(tokenizer)
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
        open_rows = [i for i in open_rows if not ends.reached(rows[i][starts[i] :], tokenizer)]
        if not open_rows:
            break
    return [row[start:] for row, start in zip(rows, starts, strict=True)]


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
