"""A value of a row as a text, and as a class."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal

from atoll.errors import BadValueError
from atoll.tasks.readers.reader import ClassNumber, Unreadable
from atoll.tasks.rows import RowProblem

Row = Mapping[str, object]
_WHOLE = re.compile("-?[0-9]{1,18}")


def as_text(row: Row, column: str) -> str:
    """A value as text.

    Raises: RowProblem where there is none, or where it is a list, an object or bytes.
    """
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowProblem("no value (null, or the key is missing)", "a text", column)
    if not isinstance(value, str | int | float | Decimal | date | time):
        got = value.why if isinstance(value, Unreadable) else f"a {type(value).__name__}"
        raise RowProblem(got, "a text or a number", column)
    if isinstance(value, float) and math.isinf(value):
        raise RowProblem("a number without end", "a text or a number", column)
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowProblem("half of a surrogate pair", "text that can be written as UTF-8", column) from None
    return text


def class_of(row: Row, column: str) -> str:
    """The class that a row names: its text without space around it; a whole number, however it is stored.

    Raises: RowProblem where it names none.
    """
    value = row.get(column)
    if isinstance(value, ClassNumber):
        value = value.label
    whole = isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value)
    label = str(int(value)) if whole and isinstance(value, float | Decimal) else as_text({column: value}, column).strip()
    if not label:
        raise RowProblem("an empty text", "the name of a class", column)
    return label


def check_alike(labels: Sequence[str], where: str) -> None:
    """Whether classes differ in more than how they are written.

    Raises: BadValueError naming two that are hardly meant to be two.
    """
    seen: dict[object, str] = {}
    for label in labels:
        other = seen.setdefault(_spelling(label), label)
        if other != label:
            raise BadValueError(
                "two classes differ in nothing but how they are written", where=where, got=f"{other!r} and {label!r}",
                expected="one way of writing each class", do="write them alike; if they are two, name all classes in [evaluate] labels",
            )  # fmt: skip


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Different classes in the order of their numbers: whole numbers as such, 2 before 10, and any others as texts."""
    found = set(labels)
    return tuple(sorted(found, key=int if all(_WHOLE.fullmatch(label) for label in found) else None))


def _spelling(label: str) -> object:
    try:
        number = float({"true": "1", "false": "0"}.get(label.casefold(), label))
    except ValueError:
        return " ".join(unicodedata.normalize("NFKC", label).casefold().split())
    return number if math.isfinite(number) else label.casefold()
