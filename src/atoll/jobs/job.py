"""A run made ready: everything that run.toml names is found, read and checked, and nothing is written yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from atoll.adapters.attach import Killed, attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.peft_files import load_adapter
from atoll.adapters.state import AdapterState
from atoll.base.load import Base, load_base
from atoll.base.shapes import read_shapes
from atoll.config.load import LoadedConfig, load
from atoll.config.schema import RunConfig
from atoll.engines.split.host.server import Host
from atoll.errors import AdapterFitError
from atoll.jobs.sources import EdgeRows, base_source, edge_rows, eval_rows
from atoll.jobs.split import HostAccess, HostLimits, SplitSide, join, largest_batch_tokens, serve, start_host
from atoll.runs.events import DataLoaded
from atoll.selection.choosing import Chooser, chooser_of
from atoll.selection.plan import BITS, EdgePlan, FleetPlan, plan_fleet
from atoll.selection.schedule import check_schedules
from atoll.shapes import BaseShapes
from atoll.tasks.batches import BatchStream, check_packing
from atoll.tasks.evaluate import check_metrics
from atoll.tasks.rows import Rows
from atoll.tasks.text import TextForm, text_form
from atoll.tasks.tokens import Examples, pad_id, tokenize


@dataclass(frozen=True, slots=True, eq=False)
class Participant:
    """One edge of a run: what it trains on, and how."""

    name: str
    examples: Examples
    batches: BatchStream
    plan: EdgePlan
    chooser: Chooser
    """Which modules are active when."""
    uploaded_bytes: int = 0
    """Of its rows, where they are handed over (mode = "cloud")."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """All that a run needs."""

    loaded: LoadedConfig
    base: Base
    shapes: BaseShapes
    form: TextForm
    edges: tuple[Participant, ...]
    central: Participant | None
    """One trainer that sees all rows, for as many steps as all edges together, where the run compares with it."""
    held_out: Rows | None
    plan: FleetPlan
    start: AdapterState
    data_events: tuple[DataLoaded, ...]
    """What was read, for the event log."""
    split: SplitSide | None
    """What edges train on whose blocks run in a host; `base` is the same where no edge has the whole base."""
    host: Host | None
    """The host on loopback that this process runs for them, where none was named."""

    @property
    def config(self) -> RunConfig:
        """The checked config."""
        return self.loaded.config

    def close(self) -> None:
        """End sessions with a host, and the host where it is this process's own."""
        if self.split is not None:
            self.split.close()
        if self.host is not None:
            self.host.stop()


def prepare(config_path: Path, overrides: Sequence[str] = (), host: HostAccess | None = None) -> Job:
    """Read and check everything a run needs. With a `host`, edges train against it unless they say mode = "local".

    Raises: InputError leaves for what the user must mend; InfeasibleError where an edge cannot hold the plan.
    """
    return prepared(load(config_path, overrides), host)


def prepared(loaded: LoadedConfig, host: HostAccess | None = None, only: str | None = None) -> Job:
    """The same for a config that is read already; of one edge alone, with `only`."""
    all_edges, loaded = loaded, loaded if only is None else _alone(loaded, only)
    config = loaded.config
    # What costs nothing to check comes first: a wrong column is reported before a large model is loaded.
    shapes = read_shapes(base_source(loaded))
    rows = edge_rows(all_edges, only)
    forms = {id(edge.rows): text_form(config.data, edge.rows.columns) for edge in rows}
    held_out = eval_rows(loaded)
    form = forms[id(rows[0].rows)]
    if held_out is not None:
        check_metrics(config.evaluate, text_form(config.data, held_out.columns), held_out)
    given = _given_start(loaded, shapes)
    num_rows = {edge.name: len(edge.rows) for edge in rows}
    plan = plan_fleet(config, shapes, num_rows, start_ranks=given.ranks if given else None, has_host=host is not None)
    check_schedules(config, plan, num_rows)
    start = given or _fresh_start(config, shapes, plan)
    with ExitStack() as opened:
        base, split, own_host = _bases(loaded, plan, host, held_out is not None, opened)
        if split is not None:
            # A host that cannot be reached, or refuses, is found out before anything is written.
            for killed in (Killed(), *([Killed(tuple(start.modules), "merge")] if _merges(config) else [])):
                with attached(split.base.model, start, killed=killed):
                    split.blocks.open()
        if config.data.batching == "pack":
            check_packing(base.model, config.data.max_length)
        examples = [tokenize(edge.rows, forms[id(edge.rows)], base.tokenizer, config.data.max_length) for edge in rows]
        edges = tuple(
            replace(participant(config, shapes, base, edge.name, part, plan.edge(edge.name)), uploaded_bytes=_uploaded_bytes(edge, plan))
            for edge, part in zip(rows, examples, strict=True)
        )
        central = _central(config, shapes, base, edges, start) if "central" in config.run.compare else None
        events = tuple(_data_event(edge, part) for edge, part in zip(rows, examples, strict=True))
        opened.pop_all()  # From here on the job closes what is open.
    return Job(loaded, base, shapes, form, edges, central, held_out, plan, start, events, split, own_host)


def _merges(config: RunConfig) -> bool:
    return config.select.policy != "all" and config.select.killed == "merge"


def participant(config: RunConfig, shapes: BaseShapes, base: Base, name: str, examples: Examples, plan: EdgePlan) -> Participant:
    """An edge with the rows it trains on.

    Raises: ConflictError where a window of [select] is as long as its period.
    """
    batches = BatchStream(
        examples, batch_size=plan.batch_size, seed=config.run.seed, edge=name, batching=config.data.batching, pad_id=pad_id(base.tokenizer)
    )
    chooser = chooser_of(config, shapes, plan.ranks, edge=name, epoch_steps=-(-batches.batches_per_epoch // plan.accumulate))
    return Participant(name, examples, batches, plan, chooser)


def _central(config: RunConfig, shapes: BaseShapes, base: Base, edges: Sequence[Participant], start: AdapterState) -> Participant:
    steps = sum(edge.plan.num_steps for edge in edges)
    plan = replace(edges[0].plan, name="central", num_steps=steps, ranks=start.ranks)
    return participant(config, shapes, base, "central", edges[0].examples.joined(*(edge.examples for edge in edges[1:])), plan)


def _uploaded_bytes(edge: EdgeRows, plan: FleetPlan) -> int:
    """Bytes of an edge's rows as JSON lines, where it hands them over."""
    if plan.edge(edge.name).mode != "cloud":
        return 0
    return sum(len(json.dumps(dict(edge.rows[number]), ensure_ascii=False, default=str).encode()) + 1 for number in range(len(edge.rows)))


def _alone(loaded: LoadedConfig, name: str) -> LoadedConfig:
    edges = tuple(edge for edge in loaded.config.edge if edge.name == name)
    federated = loaded.config.federated.model_copy(update={"min_edges": 1})
    return replace(loaded, config=loaded.config.model_copy(update={"edge": edges, "federated": federated}))


def _bases(
    loaded: LoadedConfig, plan: FleetPlan, access: HostAccess | None, scores: bool, opened: ExitStack
) -> tuple[Base, SplitSide | None, Host | None]:
    """The base in this process, and what split edges train on: against the host that was named, or one on loopback that starts here."""
    source, config = base_source(loaded), loaded.config
    modes = {edge.mode for edge in plan.edges}
    max_tokens = largest_batch_tokens(config, max(edge.batch_size for edge in plan.edges), scores=scores)
    if access is not None and modes == {"split"}:
        split = join(source, config, access, max_tokens)
        opened.callback(split.close)
        return split.base, split, None
    base = load_base(source, precision=config.model.precision)
    if "split" not in modes:
        return base, None, None
    own_host = None
    if access is None:
        limits = HostLimits(max_tokens=max_tokens, merges=True)
        served = serve(base, source, config.model.precision, BITS[config.model.precision], limits)
        own_host = start_host(served, limits, "127.0.0.1:0", None)
        opened.callback(own_host.stop)
        access = HostAccess(f"127.0.0.1:{own_host.port}")
    split = join(source, config, access, max_tokens)
    opened.callback(split.close)
    return base, split, own_host


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
