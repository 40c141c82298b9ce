"""A work order as text, for an edge on another machine; and texts of other machines, read strictly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from atoll.errors import ProtocolError
from atoll.jobs.backends.backend import WorkOrder
from atoll.printable import printable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SentOrder:
    """All that an edge must be told."""

    order: WorkOrder
    pool: tuple[str, ...]
    """Full names of all modules that may have an adapter."""
    labels: tuple[str, ...]
    """The classes of the whole run; none where it generates."""
    run_id: str


_SENT_ORDER = TypeAdapter(SentOrder)


def to_text(order: WorkOrder, pool: Sequence[str], labels: Sequence[str], run_id: str) -> str:
    """The work order as JSON; equal ones are equal texts. What a plan says to people stays here."""
    told = {field.name: getattr(order, field.name) for field in fields(order)}
    told["plan"] = replace(order.plan, why="", prices=(), wire_why="").to_json()
    return json.dumps({"order": told, "pool": list(pool), "labels": list(labels), "run_id": run_id}, sort_keys=True)


def from_text(text: str) -> SentOrder:
    """What `to_text` wrote.

    Raises: ProtocolError for a text of another version.
    """
    return read_strictly(_SENT_ORDER, text, "an order")


def read_strictly(kind: TypeAdapter[T], text: str, what: str) -> T:
    """A value from JSON of another machine: every field of its type, and in its bounds.

    Raises: ProtocolError that names the field.
    """
    try:
        return kind.validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ProtocolError(
            f"{what} cannot be read", got=printable(f"{place}: {first['msg']}" if place else first["msg"])[:300],
            expected="what this version of Atoll writes", do="run the same version of Atoll everywhere",
        ) from None  # fmt: skip
