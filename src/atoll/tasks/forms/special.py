"""Tokens that rows bring along as text, and the end token that a tokenizer may not have: trained as they are, and told."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from atoll.tasks.readers.nearest import few_names
from atoll.tasks.rows import Rows
from atoll.tasks.text import TextForm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_notes(rows: Rows, form: TextForm, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What is to be told of the special tokens of these rows."""
    notes = []
    if tokenizer.eos_token_id is None and form.adds_special_tokens and form.classes is None:
        notes.append("the tokenizer has no end token: nothing teaches the model where an answer ends")
    tokens = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    if not tokens:
        return tuple(notes)
    special, found, first = re.compile("|".join(map(re.escape, tokens))), dict[str, None](), list[int]()
    for column in sorted(form.columns & set(rows.columns)):
        for number, value in enumerate(rows.column(column)):
            held = special.findall(value if isinstance(value, str) else str(value)) if isinstance(value, str | list) else []
            if held:
                found |= dict.fromkeys(held)
                first.append(number)
    if found:
        held_by = f"{len(set(first))} rows hold {few_names(map(repr, found))} as text"
        notes.append(f"{held_by}, which is taken for the token itself (first: {rows.where(min(first))})")
    return tuple(notes)
