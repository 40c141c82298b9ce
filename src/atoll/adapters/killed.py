"""What becomes of a module that is killed: evaluated with its adapter frozen, left out, or merged into a copy of its weight.

Which modules are killed, and when, is decided in selection/ (selector.py, and kill_and_revive.py for the paper's policy).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from atoll.adapters.layers import adapted, frozen_pair, merged
from atoll.adapters.places import Places
from atoll.adapters.state import AdapterState

KilledHow = Literal["offload", "skip", "merge"]


@dataclass(frozen=True, slots=True)
class Killed:
    """Modules that are not trained, and what becomes of them: evaluated where their blocks run, left out, or merged."""

    names: Collection[str] = ()
    how: KilledHow = "offload"


def kill(places: Places, state: AdapterState, killed: Killed) -> None:
    """Put the killed modules on the model as `killed` says; where their blocks run in a host, its placeholder is told."""
    if killed.how == "skip":
        return
    for name in killed.names:
        adapter = state.modules[name]
        pair = frozen_pair(state.kind, adapter, places.device)
        if places.remote_blocks is not None and places.is_remote(name, adapter):
            places.remote_blocks.killed[name], places.remote_blocks.merges = pair, killed.how == "merge"
            continue
        original = places.original(name, adapter)
        if killed.how == "merge":
            places.replace(name, places.on_frozen_delta(name, merged(name, original, pair)))
        else:
            places.replace(name, adapted(places.on_frozen_delta(name, original), pair))
