"""The adapter that a run starts from: one that run.toml names, or a new one."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.adapters.fresh import fresh_adapters, fresh_full_weights, head_state
from atoll.adapters.peft_files import load_adapter
from atoll.adapters.state import AdapterState
from atoll.base.load import Base
from atoll.config.load import LoadedConfig
from atoll.config.schema import RunConfig
from atoll.errors import AdapterFitError
from atoll.planner.edge_plan import FleetPlan
from atoll.shapes import BaseShapes


def given_start(loaded: LoadedConfig, shapes: BaseShapes) -> AdapterState | None:
    """The adapter that run.toml names to start from, if any. Raises: AdapterFolderError, AdapterFitError."""
    if loaded.config.adapter.start is None:
        return None
    folder = loaded.resolve(loaded.config.adapter.start)
    state, asked = load_adapter(folder), loaded.config.adapter.kind
    check_fits(state, {module.name: (module.d_in, module.d_out) for module in (*shapes.modules, *shapes.head)}, str(folder))
    if asked == "full" and state.kind == "lora":
        return state.as_full_weights()
    kind = "full" if state.full_weights.keys() - {module.name for module in shapes.head} else state.kind
    if kind != asked:
        raise AdapterFitError(
            "the adapter to start from is of another kind", where=str(folder), got=kind, expected=asked,
            do=f'write kind = "{kind}" in [adapter], or start from another adapter',
        )  # fmt: skip
    return state


def block_ranks(state: AdapterState, shapes: BaseShapes) -> dict[str, int]:
    """An adapter's ranks, by full name of the blocks' modules."""
    ranks = state.ranks
    return {module.name: ranks[module.name] for module in shapes.modules if module.name in ranks}


def with_head(state: AdapterState, base: Base) -> AdapterState:
    """The state, with a classifier's head as it starts where there is none in it."""
    return AdapterState(state.kind, state.modules, {**head_state(base.head).full_weights, **state.full_weights})


def fresh_start(config: RunConfig, shapes: BaseShapes, plan: FleetPlan) -> AdapterState:
    """A new common adapter, at the largest rank that any edge has."""
    ranks: dict[str, int] = {}
    for edge in plan.edges:
        for name, rank in edge.ranks.items():
            ranks[name] = max(ranks.get(name, 0), rank)
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    if config.adapter.kind == "full":
        return fresh_full_weights(sizes, ranks)
    embeddings = {module.name for module in shapes.modules if module.outside == "embedding"}
    return fresh_adapters(config.adapter.kind, sizes, ranks, config.adapter.alpha, config.run.seed, embeddings)


def check_fits(state: AdapterState, sizes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Whether an adapter is for a base of these module sizes.

    Raises: AdapterFitError naming the first module that is missing or of another size.
    """
    for name, adapter in state.parts.items():
        if sizes.get(name) != adapter.size:
            raise AdapterFitError(
                "the adapter is for another base", where=where, got=f"{name} with (inputs, outputs) = {adapter.size}",
                expected=f"{sizes[name]}" if name in sizes else "modules such as " + ", ".join(list(sizes)[:3]),
                do="give an adapter that was trained on this base",
            )  # fmt: skip
