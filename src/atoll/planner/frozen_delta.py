"""The frozen delta from round to round, as far as ranks alone tell: an upper bound, and the same for all edges.

Every round adds to it, and all of it goes to every edge in every round. It begins with nothing, but where `stack` is given a start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from atoll.cost.formulas import ADAPTER_BYTES_PER_PARAMETER, frozen_payload_bytes
from atoll.registry.parts import Part, find
from atoll.shapes import BaseShapes, ModuleShape


@dataclass(frozen=True, slots=True)
class FrozenDelta:
    """What lies there during some rounds that follow each other."""

    ranks: Mapping[str, int]
    """In the last of them, by full module name."""
    down_bytes: int
    """To one edge, in all of them together."""
    last_bytes: int
    """Of these, in the last of them."""


Ranks = Sequence[Mapping[str, int]]
"""Of every edge, by full module name."""


def frozen_delta(
    rule: str, shapes: BaseShapes, spans: Iterable[tuple[int, Ranks]], start_ranks: Mapping[str, int] | None = None,
    number_bytes: int = ADAPTER_BYTES_PER_PARAMETER,
) -> list[FrozenDelta]:  # fmt: skip
    """For each span, which is a number of rounds and what edges train in them; `start_ranks` are those of a start adapter.

    Two edges of ranks 2 and 1 on a module of 8 inputs and outputs, by `stack`: none, then rank 3, then 6.

        >>> base = BaseShapes("x", 64, (ModuleShape("a", 8, 8, "mlp", 0),), 8, 32, 1, None, True, 4.0, 1, 8, False)
        >>> frozen_delta("stack", base, [(3, [{"a": 2}, {"a": 1}])])
        [FrozenDelta(ranks={'a': 6}, down_bytes=576, last_bytes=384)]
        >>> frozen_delta("residual", base, [(2, [{"a": 2}, {"a": 1}]), (1, [{"a": 2}, {"a": 2}])])
        [FrozenDelta(ranks={'a': 2}, down_bytes=128, last_bytes=128), FrozenDelta(ranks={'a': 4}, down_bytes=256, last_bytes=256)]
    """
    part = find("aggregation", rule)
    ranks = dict(start_ranks or {}) if part.trait("starts_anew") else {}
    found = []
    for num_rounds, edges in spans:
        added = _added(part, shapes, edges) if part.trait("keeps_frozen_delta") else {}
        last, down_bytes, last_bytes = ranks, 0, 0
        for _ in range(num_rounds):
            last, last_bytes = ranks, frozen_payload_bytes(shapes, ranks, number_bytes)
            down_bytes += last_bytes
            ranks = _sum(shapes, ranks, added)
        found.append(FrozenDelta(last, down_bytes, last_bytes))
    return found


def _sum(shapes: BaseShapes, ranks: Mapping[str, int], added: Mapping[str, int]) -> dict[str, int]:
    """What is wider than its module is brought to its module's width."""
    total = {m.name: min(m.d_in, m.d_out, ranks.get(m.name, 0) + added.get(m.name, 0)) for m in shapes.modules}
    return {name: rank for name, rank in total.items() if rank}


def _added(rule: Part, shapes: BaseShapes, edges: Ranks) -> dict[str, int]:
    """The most that a round adds to every module: all edges trained it."""
    by_module: dict[str, list[int]] = {}
    for ranks in edges:
        for name, rank in ranks.items():
            by_module.setdefault(name, []).append(rank)
    sizes = {module.name: module for module in shapes.modules}
    if not rule.trait("pads"):
        return {name: _stacked(sizes[name], ranks) for name, ranks in by_module.items()}
    # Of the factors side by side the mean of all is in reach of the padded mean: as many columns as the narrowest edge has.
    return {name: sum(ranks) - min(ranks) for name, ranks in by_module.items()}


def _stacked(module: ModuleShape, ranks: Sequence[int]) -> int:
    """All factors side by side or, once that is more numbers than their product has, the product beside an identity."""
    side_by_side = sum(ranks)
    dense = len(ranks) > 1 and side_by_side * (module.d_in + module.d_out) > module.num_weights
    return min(module.d_in, module.d_out) if dense else side_by_side
