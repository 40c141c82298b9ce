"""What is trained as it is, and told: tokens that rows bring along as text, answers of nothing, no end token, rows that are scored, too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from atoll.tasks.readers.nearest import few_names
from atoll.tasks.rows import RowProblem, Rows
from atoll.tasks.text import Row, Template, TextForm
from atoll.tasks.tokens import Examples
from atoll.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_notes(rows: Rows, form: TextForm, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What is to be told of the special tokens of these rows."""
    notes = []
    if tokenizer.eos_token_id is None and form.adds_special_tokens and form.classes is None:
        notes.append("the tokenizer has no end token: nothing teaches the model where an answer ends")
    answer = None if form.classes is not None else form.completion
    silent = [] if answer is None else [number for number in range(len(rows)) if _is_blank(rows[number], answer)]
    if silent:
        verb = "holds" if len(silent) == 1 else "hold"
        notes.append(f"{counted(len(silent), 'row')} {verb} nothing to learn but the end of a text (first: {rows.where(silent[0])})")
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
        held_by = f"{counted(len(set(first)), 'row')} {'holds' if len(set(first)) == 1 else 'hold'} {few_names(map(repr, found))} as text"
        notes.append(f"{held_by}, which is taken for the token itself (first: {rows.where(min(first))})")
    return tuple(notes)


def seen_note(trained: Sequence[Examples], scored: Examples) -> str:
    """What is to be told of held-out rows that are trained on, token for token; nothing where there are none."""
    known = {(one.token_ids.tobytes(), one.label) for part in trained for one in part.items}
    seen = sum((one.token_ids.tobytes(), one.label) in known for one in scored.items)
    taken = f"{seen} of {len(scored)} held-out rows stand among the training rows, too"
    return f"{taken}: the scores say in part how well rows are learned by heart" if seen else ""


def _is_blank(row: Row, answer: Template) -> bool:
    try:
        return not answer.render(row).strip()
    except RowProblem:
        return False  # Told where it is refused or skipped.
