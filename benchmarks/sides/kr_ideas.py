"""Policies that are tried beside those that ship; a copy of this file lies beside each run.toml that names one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from atoll.registry.options import Options as PartOptions
from atoll.selection.kill_and_revive import KillAndRevive
from atoll.selection.policy import Choice, highest
from atoll.selection.pool import PoolModule


class Shrinking(KillAndRevive):
    """Kill-and-Revive whose share of active modules shrinks geometrically over the run."""

    class Options(PartOptions):
        """Of [options."kr_ideas:Shrinking"]."""

        steps: int
        """Of the run."""
        first: float = 1 / 4
        last: float = 1 / 16

    def __init__(self, options: Options) -> None:
        self._options = options

    def choose(self, pool: Sequence[PoolModule], scores: Mapping[str, float], choice: Choice) -> Iterable[str]:
        """What moves most, fewer each time."""
        asked = self._options
        share = asked.first * (asked.last / asked.first) ** (choice.steps_done / asked.steps)
        return highest(scores, max(1, round(share * len(pool))))
