"""An adapter for readers that know one rank and one scaling for all modules, and an adapter's place in a family's blocks."""

from __future__ import annotations

from collections import Counter

import torch
from torch.nn.functional import pad

from atoll.adapters.peft_files import pair_of
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.base.families import FAMILIES, locate


def of_one_rank(state: AdapterState) -> AdapterState:
    """The same change, every module with the highest rank of all and with the commonest scaling; full weights as pairs.

    Zeros fill the ranks. Where a module's scaling is another, the quotient of both is multiplied into `up`.
    """
    pairs = {**state.modules, **{name: pair_of(change) for name, change in state.full_weights.items()}}
    rank = max(pair.rank for pair in pairs.values())
    scaling = Counter(pair.scaling for pair in pairs.values() if pair.scaling).most_common(1)
    return AdapterState(state.kind, {name: _fitted(pair, rank, scaling[0][0] if scaling else 1.0) for name, pair in pairs.items()})


def outside_blocks(names: tuple[str, ...], model_type: str) -> list[str]:
    """Those of these modules that are no projection of attention or feed-forward in a block, as the family has them."""
    family = FAMILIES[model_type]
    places = {name: locate(name, family) for name in names}
    return [name for name, place in places.items() if place is None or place[2] not in (*family.attention, *family.mlp)]


def _fitted(pair: ModuleAdapter, rank: int, scaling: float) -> ModuleAdapter:
    more = rank - pair.rank
    up_OR = pair.up_OR if pair.scaling == scaling else (pair.up_OR.double() * (pair.scaling / scaling)).float()
    return ModuleAdapter(torch.cat([pair.down_RI, pair.down_RI.new_zeros(more, pair.size[0])]), pad(up_OR, (0, more)), scaling)
