"""Which completions compete for a row, and which of them is right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from atoll.config.schema import Evaluate
from atoll.errors import BadValueError
from atoll.tasks.forms.values import as_text
from atoll.tasks.rows import RowProblem, Rows
from atoll.tasks.text import TextForm
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
            given = _options(row, settings.choices)
            options = tuple(str(option) for option in given)
            completions = tuple(form.as_completion(option) for option in options)
            if settings.answer is None:
                truth = _named(form.reference(row), options, completions, "")
            else:
                truth = _chosen(row, settings.answer, given, completions, form)
            yield Ranking(number, completions, truth)
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
            yield Ranking(number, completions, _named(reference, options, completions, ""))
        except RowProblem as problem:
            skip_or_raise(rows, number, problem)


def _options(row: Mapping[str, object], column: str) -> Sequence[str | int | float]:
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise RowProblem(f"{value[:60]!r}", "a list of texts, or the JSON text of one", column) from None
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(option, str | int | float) for option in value):
        raise RowProblem(f"{str(value)[:60]!r}", "a list of at least two texts", column)
    if len({str(option).strip() for option in value}) < len(value):
        raise RowProblem(f"{str(value)[:60]!r}", "choices that differ", column)
    return value


def _chosen(
    row: Mapping[str, object], column: str, given: Sequence[str | int | float], completions: Sequence[str], form: TextForm
) -> int:  # fmt: skip
    """The choice that an answer names: by its text, or by its number from 0.

    Where choices are numbers themselves it may be both. Then what the row has for its completion decides; or else a number (which no CSV
    has) is meant as one where the choices are texts.
    """
    answer, options = as_text(row, column), [str(option) for option in given]
    value = row[column]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    number = int(value) if is_number else int(answer) if answer.strip().isdecimal() else -1  # type: ignore[call-overload]
    by_number = number if 0 <= number < len(options) else None
    by_text = _find(answer, options, completions)
    if by_number is None or by_text is None or by_number == by_text:
        return _named(answer, options, completions, column) if by_number is None else by_number if by_text is None else by_text
    said = _find(form.reference(row), options, completions)
    if said in (by_number, by_text):
        return int(said)  # type: ignore[arg-type]
    if is_number and all(isinstance(option, str) for option in given):
        return by_number
    raise RowProblem(
        f"{answer!r}, which is one of the choices, and the number of {options[by_number]!r}",
        "a completion that is one of the choices, or choices that are texts with an answer that is a number", column,
    )  # fmt: skip


def _find(answer: str, *several: Sequence[str]) -> int | None:
    """Where a text stands among the choices, spaces at both ends aside."""
    for texts in several:
        stripped = [text.strip() for text in texts]
        if answer.strip() in stripped:
            return stripped.index(answer.strip())
    return None


def _named(answer: str, options: Sequence[str], completions: Sequence[str], column: str) -> int:
    found = _find(answer, options, completions)
    if found is not None:
        return found
    shown = ", ".join(option[:30] for option in options[:6])
    raise RowProblem(f"{answer[:60]!r}", f"one of {shown}" + (f", or a number from 0 to {len(options) - 1}" if column else ""), column)
