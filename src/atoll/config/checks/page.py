"""The error of values that exclude each other, with the place of one of them."""

from __future__ import annotations

from atoll.config.document import Document, Location
from atoll.errors import ConflictError


def conflict(document: Document, location: Location, what: str, got: str, expected: str, do: str) -> ConflictError:
    """At this place of the file."""
    return ConflictError(what, where=document.where(location), got=got, expected=expected, do=do)
