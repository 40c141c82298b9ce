"""What an edge reports, read as what it must be: the one place where a peer's figures become figures of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from atoll.cost.meters import FirstStep
from atoll.cost.work import Work
from atoll.errors import UpdateRefusedError
from atoll.printable import printable

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a record raises where something else lies there: Python's own errors and torch's, among them texts that are too deep or
numbers that are too long. Errors of the disk and of memory are none: they end a run, whoever sent what was read."""
LARGEST = 2**80
"""No figure of a round comes near it, FLOPs of the largest model on a million tokens neither; sums of such are finite as a float."""
_MOST_KINDS, _LONGEST_KIND = 32, 32
_LONGEST_SHOWN, _LONGEST_NUMBER = 200, 256
"""Characters, and bits, of what a page quotes."""


def whole_number(record: Mapping[str, object], key: str) -> int:
    """A count.

    Raises: KeyError, ValueError.
    """
    value = record[key]
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{key} = {shown(value)} where a whole number from 0 to {LARGEST:.0e} belongs")
    return value


def finite_number(record: Mapping[str, object], key: str) -> float:
    """A measure, such as a loss or a score.

    Raises: KeyError, ValueError.
    """
    value = record[key]
    if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:  # type: ignore[operator]
        raise ValueError(f"{key} = {shown(value)} where a finite number belongs")
    return float(value)  # type: ignore[arg-type]


def counter(record: Mapping[str, object]) -> Counter[str]:
    """Counts by kinds of message.

    Raises: ValueError.
    """
    if len(record) > _MOST_KINDS:
        raise ValueError(f"counts of {len(record)} kinds of message where there are at most {_MOST_KINDS}")
    for kind in record:
        if not (kind.isidentifier() and kind.isascii() and len(kind) <= _LONGEST_KIND):
            raise ValueError(f"a count of {shown(kind)}, which is no kind of message")
    return Counter({kind: whole_number(record, kind) for kind in record})


def work_of(record: Mapping[str, object]) -> Work:
    """What `Work.to_numbers` wrote, among other things.

    Raises: KeyError, ValueError.
    """
    return Work.from_numbers({key: whole_number(record, key) for key in Work().to_numbers()})


def first_step_of(record: Mapping[str, object]) -> FirstStep:
    """What `FirstStep.to_numbers` wrote.

    Raises: KeyError, ValueError.
    """
    return FirstStep.from_numbers({key: whole_number(record, key) for key in record})


def shown(value: object) -> str:
    """A peer's value for an error page: on one line, and no longer than one."""
    if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    text = printable(repr(value[:_LONGEST_SHOWN] if isinstance(value, str | list) else value))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def said(problem: Exception) -> str:
    """What an error says of a peer's record, for an error page."""
    if isinstance(problem, KeyError) and problem.args:
        return f"no {shown(problem.args[0])}"
    text = printable(str(problem)[:_LONGEST_SHOWN])
    return text if isinstance(problem, ValueError) and text else f"{type(problem).__name__}: {text}"


@contextmanager
def reading(edge: str) -> Iterator[None]:
    """A context to read an edge's answer in: whatever its records raise is the refusal of this answer.

    Raises: UpdateRefusedError that names the edge; AdapterFitError as it comes.
    """
    try:
        yield
    except MALFORMED as problem:
        raise UpdateRefusedError(
            "an answer cannot be read", where=f"edge {edge}", got=said(problem), expected="what Atoll's edges write",
            do="run the same version of Atoll everywhere; leave the edge out if it cannot be trusted",
        ) from None  # fmt: skip
