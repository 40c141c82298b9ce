"""Sizes, rates and times as run.toml takes them: a number, or as people write them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from atoll import units


def _quantity(parse):  # type: ignore[no-untyped-def]
    """Accept a plain number or the way people write the quantity; keep the number."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


Bytes = Annotated[int, _quantity(units.parse_bytes), Field(gt=0)]
BytesOrZero = Annotated[int, _quantity(units.parse_bytes), Field(ge=0)]
BitsPerSecond = Annotated[float, _quantity(units.parse_rate_bits), Field(gt=0)]
FlopsPerSecond = Annotated[float, _quantity(units.parse_flops), Field(gt=0)]
Seconds = Annotated[float, _quantity(units.parse_seconds), Field(gt=0)]
SecondsOrZero = Annotated[float, _quantity(units.parse_seconds), Field(ge=0)]
