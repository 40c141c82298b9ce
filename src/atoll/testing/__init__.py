"""What every part of a kind must do, as checks that anybody can run on their own: atoll.testing.check("policy", Loudest)."""

from __future__ import annotations

from atoll.testing.check import check
from atoll.testing.law import BrokenLaw

__all__ = ["BrokenLaw", "check"]
