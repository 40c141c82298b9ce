"""The pool: every module that carries an adapter on an edge, in execution order, with what the choice among them needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atoll.config.schema import RunConfig
from atoll.cost.split_traffic import remote_blocks
from atoll.shapes import BaseShapes
from atoll.wire.byte_formulas import ModuleSizes


@dataclass(frozen=True, slots=True)
class PoolModule:
    """One module of the pool."""

    name: str
    """Full module name."""
    place: tuple[int, int]
    """Block, and stage in the block's computation; modules of one place read the same input."""
    size: ModuleSizes
    remote: bool
    """In a block that a host runs for this run's cut, whether or not the edge has one."""
    front: bool = False
    """In a block below those: to train it, the device needs the gradient of what it sends up."""


def pool_of(config: RunConfig, shapes: BaseShapes, ranks: Mapping[str, int]) -> tuple[PoolModule, ...]:
    """The modules with a rank above zero, by place, and in the model's order within one.

    Local edges get the flags of split ones, so that both choose alike.
    """
    middle, first = remote_blocks(config, shapes), config.model.cut.front
    found = [
        PoolModule(m.name, (m.block, m.stage), (m.d_in, m.d_out, ranks[m.name]), remote=m.block in middle, front=m.block < first)
        for m in shapes.modules
        if ranks.get(m.name, 0) > 0
    ]
    return tuple(sorted(found, key=lambda module: module.place))
