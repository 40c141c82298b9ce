"""Completions of prompts, in batches that change nothing about greedy ones.

Shape suffixes: B prompts, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from atoll.base.blocks import blocks_path, counts_in_cache, is_elsewhere, keeps_keys
from atoll.errors import BadValueError
from atoll.remote_blocks import Growth, RemoteBlocksPlaceholder, find_placeholder
from atoll.tasks.tokens import encode_texts, pad_id
from atoll.units import counted


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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn where not the most likely one is taken."""

    temperature: float
    """What logits are divided by."""
    top_p: float
    """Drawn is from the most likely tokens, as few as have this probability together."""
    seed: int

    @classmethod
    def asked(cls, temperature: float | None, top_p: float | None, seed: int | None) -> Sampling | None:
        """What somebody asked for who gave some of these; None: greedy, as with none of them, or at temperature 0.

        Raises: BadValueError.
        """
        if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
            raise _bad("temperature", temperature, "a finite number, 0 or more", "0 takes the most likely token; 1 draws as the model says")
        if top_p is not None and not 0 < top_p <= 1:
            raise _bad("top_p", top_p, "more than 0 and at most 1", "1 leaves no token out")
        if seed is not None and not 0 <= seed < 2**63:
            raise _bad("seed", seed, "a number from 0 to 2^63 - 1", "give another one")
        if temperature == 0 or (temperature is None and top_p is None and seed is None):
            return None
        return cls(1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, 0 if seed is None else seed)


def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int,
    closing: str = "", sampling: Sampling | None = None,
) -> list[str]:  # fmt: skip
    """The most likely next token again and again, or one drawn by `sampling`, until an end or `max_new_tokens`; the text without special
    tokens.

    An end is the tokenizer's or the model's, or `closing`, what a chat template writes behind an answer. A prompt that does not fit into
    the model's context together with its completion loses its beginning.

    Raises: BadValueError where `max_new_tokens` leaves no room for a prompt; where blocks are in a host, what exchanges with it raise.
    """
    room = _room(model, max_new_tokens)
    fitted = [list(prompt)[-room:] if room else list(prompt) for prompt in prompts]
    ends = ends_of(model, tokenizer, closing)
    order = sorted(range(len(fitted)), key=lambda i: len(fitted[i]))
    texts = [""] * len(fitted)
    with _drawing(model, sampling):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = _complete(model, tokenizer, [fitted[i] for i in chosen], max_new_tokens, ends, sampling)
            for i, row in zip(chosen, rows, strict=True):
                texts[i] = ends.said(row, tokenizer)
    return texts


def _complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Ends,
    sampling: Sampling | None,
) -> list[list[int]]:  # fmt: skip
    """Tokens behind each prompt, with what follows an end where others go on."""
    fill, remote_blocks = pad_id(tokenizer), find_placeholder(model)
    width = max(1, *(len(prompt) for prompt in prompts))
    # Left padding, so that every prompt ends where generation begins; an empty prompt starts from one end-of-text token.
    rows = [list(prompt) or [fill] for prompt in prompts]
    input_ids_BT = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    steps = remote_blocks is None or keeps_keys(model)
    drawn = {} if sampling is None else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        do_sample=sampling is not None, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=list(ends.token_ids) or None,
        pad_token_id=fill, use_cache=steps, stop_strings=[ends.text] if ends.text else None, **drawn,
    )  # fmt: skip
    growth = Growth(tuple(map(len, rows)), steps, tuple(range(len(rows))))
    watching: list[Any] = [] if remote_blocks is None else [_OpenRows(growth, width, ends, tokenizer)]
    with torch.no_grad(), _plain_defaults(model), _growing(model, remote_blocks, growth):
        generate: Any = model.generate
        out_BT: torch.Tensor = generate(
            input_ids=input_ids_BT, attention_mask=mask_BT, generation_config=config, tokenizer=tokenizer,
            stopping_criteria=StoppingCriteriaList(watching),
        )  # fmt: skip
    return [row[width:] for row in out_BT.tolist()]


class _OpenRows(StoppingCriteria):
    """Stops nothing; tells which rows go on, so that the others need not be sent whole again."""

    def __init__(self, growth: Growth, width: int, ends: Ends, tokenizer: PreTrainedTokenizerBase) -> None:
        self._growth, self._width, self._ends, self._tokenizer = growth, width, ends, tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: object) -> torch.Tensor:
        """Shapes: input_ids (B, T); the answer (B,)."""
        going = [row for row in self._growth.open_rows if not self._ends.reached(input_ids[row, self._width :].tolist(), self._tokenizer)]
        self._growth.open_rows = tuple(going)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _growing(model: PreTrainedModel, remote_blocks: RemoteBlocksPlaceholder | None, growth: Growth) -> Iterator[None]:
    """Inside, a generation whose middle blocks run in another process."""
    if remote_blocks is None:
        yield
        return
    blocks: Any = model.get_submodule(blocks_path(model))
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            if is_elsewhere(block):
                stack.callback(counts_in_cache(block, number).remove)
        stack.enter_context(remote_blocks.grow(growth))
        yield


@contextmanager
def _drawing(model: PreTrainedModel, sampling: Sampling | None) -> Iterator[None]:
    """Inside, torch draws from the seed, and afterwards goes on as if nothing had been drawn."""
    if sampling is None:
        yield
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(sampling.seed)
        yield


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
            expected=f"less than the {counted(context, 'token')} of the model's context", do="use a smaller number",
        )  # fmt: skip
    return int(context) - max_new_tokens


def _bad(name: str, got: object, expected: str, do: str) -> BadValueError:
    return BadValueError("tokens cannot be drawn like this", where=f"--{name.replace('_', '-')}", got=str(got), expected=expected, do=do)
