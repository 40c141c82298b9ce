"""What a part is told beside: the base of its own config model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """What a part is told beside: its class names a subclass as `Options`, and is made with an instance of it.

    Frozen, unknown keys refused, a description under every field, as the sections of run.toml.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, strict=True, allow_inf_nan=False)
