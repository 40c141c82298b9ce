"""A run made ready: everything that run.toml names is found, read and checked, and nothing is written yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.peft_files import load_adapter
from atoll.adapters.state import AdapterState
from atoll.base.load import Base, load_base
from atoll.base.shapes import read_shapes
from atoll.config.load import LoadedConfig, load
from atoll.config.schema import RunConfig
from atoll.errors import AdapterFitError
from atoll.jobs.sources import EdgeRows, base_source, edge_rows, eval_rows
from atoll.runs.events import DataLoaded
from atoll.selection.plan import EdgePlan, FleetPlan, plan_fleet
from atoll.shapes import BaseShapes
from atoll.tasks.batches import check_packing
from atoll.tasks.evaluate import check_metrics
from atoll.tasks.rows import Rows
from atoll.tasks.text import TextForm, text_form
from atoll.tasks.tokens import Examples, tokenize


@dataclass(frozen=True, slots=True, eq=False)
class Participant:
    """One edge of a run: what it trains on, and how."""

    name: str
    examples: Examples
    plan: EdgePlan


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """All that a run needs."""

    loaded: LoadedConfig
    base: Base
    shapes: BaseShapes
    form: TextForm
    edges: tuple[Participant, ...]
    held_out: Rows | None
    plan: FleetPlan
    start: AdapterState
    data_events: tuple[DataLoaded, ...]
    """What was read, for the event log."""

    @property
    def config(self) -> RunConfig:
        """The checked config."""
        return self.loaded.config


def prepare(config_path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read and check everything a run needs.

    Raises: InputError leaves for what the user must mend; InfeasibleError where an edge cannot hold the plan.
    """
    loaded = load(config_path, overrides)
    config = loaded.config
    # What costs nothing to check comes first: a wrong column is reported before a large model is loaded.
    shapes = read_shapes(base_source(loaded))
    rows = edge_rows(loaded)
    forms = {id(edge.rows): text_form(config.data, edge.rows.columns) for edge in rows}
    held_out = eval_rows(loaded)
    form = forms[id(rows[0].rows)]
    if held_out is not None:
        check_metrics(config.evaluate, text_form(config.data, held_out.columns), held_out)
    given = _given_start(loaded, shapes)
    plan = plan_fleet(config, shapes, {edge.name: len(edge.rows) for edge in rows}, start_ranks=given.ranks if given else None)
    start = given or _fresh_start(config, shapes, plan)
    base = load_base(base_source(loaded), precision=config.model.precision)
    if config.data.batching == "pack":
        check_packing(base.model, config.data.max_length)
    examples = [tokenize(edge.rows, forms[id(edge.rows)], base.tokenizer, config.data.max_length) for edge in rows]
    edges = tuple(Participant(edge.name, part, plan.edge(edge.name)) for edge, part in zip(rows, examples, strict=True))
    events = tuple(_data_event(edge, part) for edge, part in zip(rows, examples, strict=True))
    return Job(loaded, base, shapes, form, edges, held_out, plan, start, events)


def _data_event(edge: EdgeRows, examples: Examples) -> DataLoaded:
    skipped = edge.rows.num_skipped + examples.num_skipped
    return DataLoaded(
        "train", edge.name, len(examples), skipped, examples.num_truncated, examples.num_tokens, examples.num_label_tokens
    )


def _given_start(loaded: LoadedConfig, shapes: BaseShapes) -> AdapterState | None:
    if loaded.config.adapter.start is None:
        return None
    folder = loaded.resolve(loaded.config.adapter.start)
    state = load_adapter(folder)
    check_fits(state, {module.name: (module.d_in, module.d_out) for module in shapes.modules}, str(folder))
    if state.kind != loaded.config.adapter.kind:
        raise AdapterFitError(
            "the adapter to start from is of another kind", where=str(folder), got=state.kind, expected=loaded.config.adapter.kind,
            do=f'write kind = "{state.kind}" in [adapter], or start from another adapter',
        )  # fmt: skip
    return state


def _fresh_start(config: RunConfig, shapes: BaseShapes, plan: FleetPlan) -> AdapterState:
    """A new common adapter, at the largest rank that any edge has."""
    ranks: dict[str, int] = {}
    for edge in plan.edges:
        for name, rank in edge.ranks.items():
            ranks[name] = max(ranks.get(name, 0), rank)
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    return fresh_adapters(config.adapter.kind, sizes, ranks, config.adapter.alpha, config.run.seed)


def check_fits(state: AdapterState, sizes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Whether an adapter is for a base of these module sizes.

    Raises: AdapterFitError naming the first module that is missing or of another size.
    """
    for name, adapter in state.modules.items():
        if sizes.get(name) != adapter.size:
            raise AdapterFitError(
                "the adapter is for another base", where=where, got=f"{name} with (inputs, outputs) = {adapter.size}",
                expected=f"{sizes[name]}" if name in sizes else "modules such as " + ", ".join(list(sizes)[:3]),
                do="give an adapter that was trained on this base",
            )  # fmt: skip
