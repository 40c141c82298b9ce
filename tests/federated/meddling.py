"""A federation without models: edges that move their adapters by numbers of their own, and a grid that changes what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.cost.work import Work
from atoll.federated.client import EdgeWork, client_app
from atoll.federated.flower import Context, Message, RecordDict
from atoll.federated.grid import InProcessGrid
from atoll.federated.strategy import AdapterStrategy, EdgeResult, Observer, RoundResult
from atoll.training.trainer import Batches, FitPlan, StepReport, TrainState, Update

SIZES = {"a": (7, 9), "wide": (24, 20)}
START = fresh_adapters("lora", SIZES, {"a": 4, "wide": 4}, alpha=8, seed=0)
BASE = "b" * 64
Meddle = Callable[[int, list[Message]], Iterable[Message]]
"""Given the round and all its replies, what reaches the coordinator."""


class Mover:
    """A trainer that adds noise of its own to every number."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fit(self, state: TrainState, batches: Batches | None, plan: FitPlan, on_step: Callable[[StepReport], None]) -> Update:
        """The moved adapter."""
        g = torch.Generator().manual_seed(1000 * self._seed + state.step)
        modules = {
            name: ModuleAdapter(*(t + 0.1 * torch.randn(t.shape, generator=g) for t in one.tensors), one.scaling)
            for name, one in state.adapter.modules.items()
        }
        whole = {
            name: FullWeightDelta(*(t + 0.1 * torch.randn(t.shape, generator=g) for t in one.tensors))
            for name, one in state.adapter.full_weights.items()
        }
        moved = AdapterState(state.adapter.kind, modules, whole)
        report = StepReport(state.step, 1.0, 1e-3, 1.0, 8, 4, ((1, 8),), (*modules, *whole))
        return Update(TrainState(moved, {}, state.step + 1), (report,))


class Told:
    """What the observer was told."""

    def __init__(self) -> None:
        self.finished: list[tuple[int, str]] = []
        self.dropped: list[tuple[int, str, str]] = []
        self.rounds: list[RoundResult] = []

    @property
    def observer(self) -> Observer:
        """To be given to a strategy."""
        return Observer(
            lambda _: None, lambda number, result: self.finished.append((number, result.edge)),
            lambda *args: self.dropped.append(args), self.rounds.append,
        )  # fmt: skip


class MeddlingGrid(InProcessGrid):
    """Hands over what `meddle` makes of a round's replies."""

    meddle: Meddle

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies of the round, changed."""
        replies = list(super().send_and_receive(messages, timeout=timeout))
        return self.meddle(int(replies[0].metadata.group_id), replies) if replies else replies


def federate(
    ranks: Sequence[int], meddle: Meddle, *, start: AdapterState = START, rounds: int = 2, examples: Mapping[str, int] | None = None,
    enough: int = 1, **strategy: object,
) -> tuple[AdapterStrategy, Told]:  # fmt: skip
    """Rounds of one edge for each rank, called edge0, edge1, ..."""
    told, names = Told(), [f"edge{number}" for number in range(len(ranks))]
    works = {
        name: EdgeWork(
            name, Mover(number), None, (examples or {}).get(name, 3 + number), FitPlan(1, 1, False), False,  # type: ignore[arg-type]
            lambda _: Work(), lambda *_: None, base_digest=BASE,
        )
        for number, name in enumerate(names)
    }  # fmt: skip
    nodes = {number + 1: name for number, name in enumerate(names)}
    given = {name: start.ranks | dict.fromkeys(start.modules, rank) for name, rank in zip(names, ranks, strict=True)}
    bases = dict.fromkeys(names, BASE)
    coordinator = AdapterStrategy(start, given, nodes, enough, told.observer, base_digests=bases, run_id="run-0001", **strategy)  # type: ignore[arg-type]
    contexts = {node: Context(1, node, {"edge": name}, RecordDict(), {}) for node, name in nodes.items()}
    grid = MeddlingGrid(client_app(lambda context: works[str(context.node_config["edge"])]), contexts)
    grid.meddle = meddle
    coordinator.start(grid, coordinator.arrays(), rounds, 3600.0)
    return coordinator, told


def late(edge: str) -> Callable[[EdgeResult], str | None]:
    """A deadline that this edge misses."""
    return lambda result: "done after 9 s" if result.edge == edge and result.num_steps else None
