"""The seam of privacy: functions from an edge's update to the one that leaves the edge, in the order of [privacy] transforms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from atoll.adapters.state import AdapterState
from atoll.errors import PartError
from atoll.registry.parts import make
from atoll.seeding import stream


@dataclass(frozen=True, slots=True, eq=False)
class UpdateContext:
    """What an update is of."""

    sent: AdapterState
    """What the edge was sent in this round, of which the update is what came of it."""
    edge: str
    round: int
    num_examples: int
    seed: int
    """For what is random: equal runs draw the same. A guarantee against who knows the seed needs another source."""


class UpdateTransform(Protocol):
    """A transform, made anew for every update."""

    def apply(self, update: AdapterState, context: UpdateContext) -> AdapterState:
        """The update that leaves, of the same modules, ranks and scalings; the one that is given stays as it is."""


def transformed(
    update: AdapterState, names: Sequence[str], options: Mapping[str, Mapping[str, object]], context: UpdateContext
) -> AdapterState:
    """The update after all transforms.

    Raises: PartError, by the transform's name, where one makes something that is not an update of these modules: nothing leaves.
    """
    for number, name in enumerate(names):
        seed = stream(context.seed, f"transform/{number}/{name}", edge=context.edge, round=context.round)
        own = UpdateContext(context.sent, context.edge, context.round, context.num_examples, seed)
        made = make("transform", name, options.get(name)).apply(update, own)
        if not isinstance(made, AdapterState) or _form(made) != _form(update):
            raise PartError(
                f"the transform {name} made something else than an update", where=f"edge {context.edge}", got=type(made).__name__,
                expected="the same modules, of the same sizes, ranks and scalings",
                do='see what it returns with atoll.testing.check("transform", ...)',
            )  # fmt: skip
        update = made
    return update


def _form(state: AdapterState) -> object:
    scalings = {name: adapter.scaling for name, adapter in state.modules.items()}
    shapes = {name: [(tensor.shape, tensor.dtype) for tensor in part.tensors] for name, part in state.parts.items()}
    return state.kind, scalings, shapes
