"""Which completions compete for a row, and which of them is right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from atoll.config.schema import Evaluate
from atoll.errors import BadValueError
from atoll.tasks.rows import RowProblem, Rows
from atoll.tasks.text import TextForm, as_text
from atoll.tasks.tokens import skip_or_raise

MOST_LABELS = 256
"""More different completions than this are no labels but free text."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """A row, the completions to compare, and which of them is right."""

    row: int
    completions: tuple[str, ...]
    truth: int


def choice_rankings(rows: Rows, usable: Sequence[int], form: TextForm, settings: Evaluate) -> Iterator[Ranking]:
    """The rows with the choices of their own that a column holds.

    Raises: BadRowError.
    """
    assert settings.choices is not None
    for number in usable:
        row = rows[number]
        try:
            options = _options(row, settings.choices)
            answer = form.reference(row) if settings.answer is None else as_text(row, settings.answer)
            completions = tuple(form.as_completion(option) for option in options)
            yield Ranking(number, completions, _which(answer, options, completions, settings.answer or ""))
        except RowProblem as problem:
            skip_or_raise(rows, number, problem)


def label_rankings(rows: Rows, usable: Sequence[int], form: TextForm, settings: Evaluate) -> Iterator[Ranking]:
    """The rows with the same labels to choose from for all: those in `settings`, or the completions that occur.

    Raises: BadRowError, BadValueError.
    """
    references = {number: form.reference(rows[number]) for number in usable}
    if settings.labels is None:
        options = completions = tuple(sorted(set(references.values())))
    else:
        options, completions = settings.labels, tuple(form.as_completion(label) for label in settings.labels)
    if not 2 <= len(completions) <= MOST_LABELS:
        raise BadValueError(
            "the completions of the held-out rows are no labels", where="[evaluate] labels", got=f"{len(completions)} different ones",
            expected=f"2 to {MOST_LABELS}", do="list the labels in [evaluate] labels, or leave label_accuracy out",
        )  # fmt: skip
    for number, reference in references.items():
        try:
            yield Ranking(number, completions, _which(reference, options, completions, ""))
        except RowProblem as problem:
            skip_or_raise(rows, number, problem)


def _options(row: Mapping[str, object], column: str) -> tuple[str, ...]:
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise RowProblem(f"{value[:60]!r}", "a list of texts, or the JSON text of one", column) from None
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(option, str | int | float) for option in value):
        raise RowProblem(f"{str(value)[:60]!r}", "a list of at least two texts", column)
    return tuple(str(option) for option in value)


def _which(answer: str, options: Sequence[str], completions: Sequence[str], column: str) -> int:
    """The option that the answer names: by its text, by the whole completion, or by its number from 0."""
    for texts in (options, completions):
        stripped = [text.strip() for text in texts]
        if answer.strip() in stripped:
            return stripped.index(answer.strip())
    if column and answer.strip().isdecimal() and int(answer) < len(options):
        return int(answer)
    shown = ", ".join(option[:30] for option in options[:6])
    raise RowProblem(f"{answer[:60]!r}", f"one of {shown}" + (f", or a number from 0 to {len(options) - 1}" if column else ""), column)
