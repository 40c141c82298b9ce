"""Keys and values that a host keeps between the exchanges of a generation: their bytes are bounded, and the least recently used go.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache


class Holder(Protocol):
    """The session that something is kept for."""

    tenant: str
    cache_bytes: int
    """How much that is now."""


@dataclass(slots=True, eq=False)
class KeptRows:
    """Keys and values at all positions of rows that end together, so that before a shorter one is padding."""

    cache: DynamicCache
    real_BT: Tensor
    """Bool: where no padding is."""

    @classmethod
    def of(cls, model: PreTrainedModel, num_rows: int) -> KeptRows:
        """None yet."""
        real_BT = torch.zeros(num_rows, 0, dtype=torch.bool, device=model.device)
        return cls(DynamicCache(config=model.config.get_text_config(decoder=True)), real_BT)

    def add(self, lengths: Sequence[int], positions: int) -> None:
        """So many positions more, the last of which are real."""
        device = self.real_BT.device
        new_BT = torch.arange(positions, device=device) >= positions - torch.tensor(lengths, device=device)[:, None]
        self.real_BT = torch.cat([self.real_BT, new_BT], 1)

    @property
    def places_BT(self) -> Tensor:
        """The number of each position in its row, as the library counts them where it generates; of padding 0."""
        return (self.real_BT.long().cumsum(-1) - 1).masked_fill(~self.real_BT, 0)

    @property
    def num_bytes(self) -> int:
        """What is held, which may be more than what is seen of it: windows are cut out of longer tensors."""
        layers: list[Any] = self.cache.layers
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@dataclass(slots=True, eq=False)
class _Place:
    """Of one session."""

    holder: Holder
    rows: KeptRows | None = None
    in_use: bool = False
    num_bytes: int = 0
    used: int = 0
    """When it was put back last; the larger, the later."""


@dataclass(eq=False)
class Shelf:
    """What is kept for all sessions: at most `most_bytes`, and for one at most half of that, so that no two can drive each other out."""

    most_bytes: int
    _places: list[_Place] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _count: int = 0

    @property
    def num_bytes(self) -> int:
        """Kept now."""
        with self._lock:
            return self._total()

    def open(self, holder: Holder) -> ShelfPlace:
        """A place for a session's rows."""
        place = _Place(holder)
        with self._lock:
            self._places.append(place)
        return ShelfPlace(self, place)

    def take(self, place: _Place) -> KeptRows | None:
        """What is kept there; nobody drives it out before it is put back."""
        with self._lock:
            place.in_use = place.rows is not None
            return place.rows

    def put(self, place: _Place, rows: KeptRows) -> bool:
        """Keep rows there, and of others what there is still room for; False where they are too many themselves."""
        num_bytes = rows.num_bytes
        with self._lock:
            self._clear(place)
            if num_bytes > self.most_bytes // 2 or not self._make_room(num_bytes):
                return False
            self._count += 1
            place.rows, place.num_bytes, place.used = rows, num_bytes, self._count
            place.holder.cache_bytes = num_bytes
            return True

    def clear(self, place: _Place, *, closes: bool = False) -> None:
        """Keep nothing there."""
        with self._lock:
            self._clear(place)
            if closes:
                self._places.remove(place)

    def _make_room(self, num_bytes: int) -> bool:
        """By the least recently used of the tenant for which most is kept: one with many sessions drives out its own."""
        while self._total() + num_bytes > self.most_bytes:
            idle = [place for place in self._places if place.rows is not None and not place.in_use]
            if not idle:
                return False
            by_tenant = {place.holder.tenant: 0 for place in idle}
            for place in idle:
                by_tenant[place.holder.tenant] += place.num_bytes
            largest = max(by_tenant.values())
            self._clear(min((one for one in idle if by_tenant[one.holder.tenant] == largest), key=lambda one: one.used))
        return True

    def _total(self) -> int:
        return sum(place.num_bytes for place in self._places)

    def _clear(self, place: _Place) -> None:
        place.rows, place.in_use, place.num_bytes, place.holder.cache_bytes = None, False, 0, 0


@dataclass(frozen=True, slots=True, eq=False)
class ShelfPlace:
    """One session's place on the shelf."""

    _shelf: Shelf
    _place: _Place

    def take(self) -> KeptRows | None:
        """What is kept; nobody drives it out before it is put back or cleared."""
        return self._shelf.take(self._place)

    def put(self, rows: KeptRows) -> bool:
        """Keep these from now on; False where they are too many."""
        return self._shelf.put(self._place, rows)

    def clear(self) -> None:
        """Keep nothing."""
        self._shelf.clear(self._place)

    def close(self) -> None:
        """Keep nothing any more."""
        self._shelf.clear(self._place, closes=True)
