"""SNIP: keep what the loss is most sensitive to, by one look at the start.

Source: Lee, Ajanthan and Torr, "SNIP: Single-shot network pruning based on connection sensitivity", ICLR 2019, eq. 3, without its
normalisation. Here of modules, not of single weights: the mean of |parameter x gradient| over a module, in one window.
"""

from __future__ import annotations

from atoll.config.schema import Select
from atoll.selection.kill_and_revive import EarlyKill
from atoll.selection.policy import ScoreKind


class Snip(EarlyKill):
    """By the mean of |parameter x gradient| in one window."""

    def measures(self, select: Select) -> ScoreKind | None:
        """|parameter x gradient|."""
        return "saliency"
