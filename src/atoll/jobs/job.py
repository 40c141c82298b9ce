"""A run made ready: everything that run.toml names is found, read and checked, and nothing is written yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from atoll.adapters.state import AdapterState
from atoll.base.load import Base
from atoll.config.checks.whole_base import classes_in_a_host
from atoll.config.load import LoadedConfig, load
from atoll.config.schema import PRECISION_BITS, RunConfig
from atoll.cost.split_traffic import largest_batch_tokens
from atoll.errors import InfeasibleError
from atoll.jobs.finished import loaded_base
from atoll.jobs.inputs import (
    EdgeRows,
    alone,
    base_shapes,
    base_source,
    data_events,
    edge_rows,
    eval_rows,
    given_importance,
    held_out_events,
    run_labels,
)
from atoll.jobs.ready.forms import unlike_forms
from atoll.jobs.ready.start import block_ranks, fresh_start, given_start, with_head
from atoll.jobs.ready.unweighted import check_bits, check_without_weights, unweighted_base
from atoll.jobs.results.adapter import check_result, check_start
from atoll.jobs.split import HostAccess, SplitSide, check_access, greet, join, scoring_mode, serve, start_host
from atoll.planner.edge_plan import EdgePlan, FleetPlan
from atoll.planner.importance import Importance
from atoll.planner.plan_fleet import by_usable_rows, check_plan, plan_fleet
from atoll.runs.events import Event
from atoll.runs.tracker import check_trackers
from atoll.selection.selector import ModuleSelector, check_schedules, selector_of
from atoll.shapes import BaseShapes
from atoll.split.host.server import Host
from atoll.split.host.tenants import HostLimits
from atoll.tasks.batches import BatchStream, check_packing
from atoll.tasks.classes import examples_of, form_of, with_classes
from atoll.tasks.evaluate import check_metrics, held_out_examples
from atoll.tasks.rows import Rows
from atoll.tasks.text import TextForm
from atoll.tasks.tokens import Examples, pad_id


@dataclass(frozen=True, slots=True, eq=False)
class WarmUpPart:
    """What an edge scores weights with."""

    batches: BatchStream | None
    gradient_checkpointing: bool


@dataclass(frozen=True, slots=True, eq=False)
class Participant:
    """One edge of a run: what it trains on, and how."""

    name: str
    examples: Examples | None
    """None where it is on a machine of its own, which alone has them."""
    batches: BatchStream | None
    plan: EdgePlan
    selector: ModuleSelector
    """Which modules are active when."""
    warm_up: WarmUpPart | None = None
    """None where it is not asked to."""
    num_rows: int = 0
    """Before tokens were made of them."""
    uploaded_bytes: int = 0
    """Of its rows, where they are uploaded (mode = "cloud")."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """All that a run needs."""

    loaded: LoadedConfig
    base: Base
    """In full precision, as the coordinator has it."""
    bases: Mapping[int, Base]
    """By the bits of the blocks' projections, what edges hold that hold the whole base."""
    shapes: BaseShapes
    form: TextForm | None
    """Of the rows; None where none are here."""
    edges: tuple[Participant, ...]
    central: Participant | None
    """One trainer that sees all rows, for as many steps as all edges together, where the run compares with it."""
    held_out: Rows | None
    plan: FleetPlan
    start: AdapterState
    data_events: tuple[Event, ...]
    """What was read, for the event log."""
    has_host: bool
    """Whether a host was named, against which edges train unless they say otherwise or a planner decides."""
    split: SplitSide | None
    """What edges train on whose blocks run in a host; `base` is the same where no edge has the whole base."""
    host: Host | None
    """The host on loopback that this process runs for them, where none was named."""
    scored: Examples | None = None
    """The held-out rows as tokens; None where there are none, or they were not made yet."""
    run_id: str = ""
    """Tells a run from others on the same fleet; empty where all is in this process."""
    asked_for: str = ""
    """There, the digest of what run.toml asks for with all its edges, also those that are not there or left."""

    @property
    def config(self) -> RunConfig:
        """The checked config."""
        return self.loaded.config

    def base_of(self, plan: EdgePlan) -> Base:
        """What an edge trains on; of one whose blocks run in a host, its part."""
        if plan.mode == "split":
            assert self.split is not None
            return self.split.base
        return self.bases[plan.bits]

    def ready_to_score(self) -> None:
        """Whatever mode an edge has trained in: rows are scored in one that depends on run.toml alone."""
        if self.split is not None and self.base is self.split.base:
            self.split.client.use(scoring_mode(self.config.wire))

    def close(self) -> None:
        """End sessions with a host, and the host where it is this process's own."""
        if self.split is not None:
            self.split.close()
        if self.host is not None:
            self.host.stop()


def prepare(config_path: Path, overrides: Sequence[str] = (), host: HostAccess | None = None) -> Job:
    """Read and check everything a run needs. With a `host`, edges train against it unless they say mode = "local" or a planner decides.

    Raises: InputError leaves for what the user must mend; InfeasibleError where an edge cannot hold the plan.
    """
    return prepared(load(config_path, overrides), host)


def prepared(loaded: LoadedConfig, host: HostAccess | None = None, only: str | None = None) -> Job:
    """The same for a config that is read already; of one edge alone, with `only`."""
    return _prepared(loaded, host, only, has_weights=True)


def rehearsed(loaded: LoadedConfig) -> Job:
    """The same without weights and without a host: a job that nothing can be trained by, to know what training would refuse.

    Raises: as `prepare`, but for what the weights, a host or a step alone tell.
    """
    return _prepared(loaded, None, None, has_weights=False)


def _prepared(loaded: LoadedConfig, host: HostAccess | None, only: str | None, *, has_weights: bool) -> Job:
    all_edges, loaded = loaded, loaded if only is None else alone(loaded, only)
    config = loaded.config
    check_access(host)
    check_trackers(config.track.to)
    if host is not None and config.model.task == "classify":
        raise classes_in_a_host(host.address)
    # What costs nothing to check comes first: a wrong column is reported before a large model is loaded.
    rows = edge_rows(all_edges, only)
    labels = run_labels(config, [edge.rows for edge in rows])
    shapes = base_shapes(loaded, len(labels))
    rows = tuple(replace(edge, form=with_classes(edge.form, config.data.label, labels)) for edge in rows)
    held_out, form = eval_rows(loaded), rows[0].form
    if held_out is not None:
        form = form_of(config.data, held_out, labels)
        check_metrics(config.evaluate, form, held_out)
    given = given_start(loaded, shapes)
    num_rows = {edge.name: len(edge.rows) for edge in rows}
    plan_for = partial(
        plan_fleet, config, shapes, start_ranks=block_ranks(given, shapes) if given else None, has_host=host is not None,
        importance=given_importance(loaded),
    )  # fmt: skip
    plan = plan_for(edges_rows=num_rows)
    rows = tuple(edge for edge in rows if edge.name in {one.name for one in plan.edges})
    check_schedules(config, plan.rows_per_step, num_rows)
    check_plan(config, plan)
    with ExitStack() as opened:
        if has_weights:
            ready = _with_weights(loaded, plan, host, held_out is not None, labels, opened)
            start = with_head(given or fresh_start(config, shapes, plan), ready.base)
            told = _looked_at(loaded, plan, ready, start, scores=held_out is not None, is_whole_run=only is None)
        else:
            ready, told = _without_weights(loaded, plan, labels), ()
            start = given or fresh_start(config, shapes, plan)
            check_without_weights(loaded, ready.base, start)
        base = ready.base
        examples = _examples(rows, base, config.data.max_length)
        usable = {**num_rows, **{edge.name: len(part) for edge, part in zip(rows, examples, strict=True)}}
        plan, num_rows = by_usable_rows(plan, num_rows, usable, plan_for)
        plans = {edge.name: edge for edge in plan.edges}
        # Held-out rows that cannot be used are found out before anything is written, too.
        settings, max_length = config.evaluate, config.data.max_length
        scored = None if held_out is None else held_out_examples(held_out, form, base.tokenizer, settings, max_length, config.options)
        edges = tuple(
            replace(
                participant(config, shapes, base, edge.name, part, plans[edge.name], num_rows[edge.name]),
                uploaded_bytes=_uploaded_bytes(edge, plans[edge.name]),
            )
            for edge, part in zip(rows, examples, strict=True)
        )
        central = _central(config, shapes, base, edges, start) if "central" in config.run.compare else None
        unlike = unlike_forms({edge.name: edge.form for edge in rows})
        found = (*data_events(config, rows, examples, labels, base.tokenizer), *unlike, *held_out_events(held_out, form, scored, examples))
        opened.pop_all()  # From here on the job closes what is open.
    return Job(
        loaded, base, ready.bases, shapes, form, edges, central, held_out, plan, start, (*told, *found), host is not None, ready.split,
        ready.host, scored,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """What edges train on, as a Job has it."""

    base: Base
    bases: Mapping[int, Base]
    split: SplitSide | None = None
    host: Host | None = None


def _with_weights(
    loaded: LoadedConfig, plan: FleetPlan, access: HostAccess | None, scores: bool, labels: Sequence[str], opened: ExitStack
) -> _Ready:  # fmt: skip
    base, split, host = _bases(loaded, plan, access, scores, labels, opened)
    return _Ready(base, _edge_bases(loaded, plan, {PRECISION_BITS[loaded.config.model.precision]: base}), split, host)


def _without_weights(loaded: LoadedConfig, plan: FleetPlan, labels: Sequence[str]) -> _Ready:
    base = unweighted_base(loaded, bool(labels))
    check_bits(loaded, plan)
    return _Ready(base, {PRECISION_BITS[loaded.config.model.precision]: base})


def _looked_at(
    loaded: LoadedConfig, plan: FleetPlan, ready: _Ready, start: AdapterState, *, scores: bool, is_whole_run: bool
) -> tuple[Event, ...]:  # fmt: skip
    """Hosts that cannot be reached, or refuse, and adapters that PEFT would not load, are found out before anything is written."""
    config, base, split = loaded.config, ready.base, ready.split
    if split is not None:
        greet(config, split, start, {edge.wire_mode for edge in plan.edges}, scores=split.base is base and scores)
    told = check_start(loaded, base)
    if is_whole_run:
        check_result(base, start, loaded)
    if config.data.batching == "pack":
        check_packing(base.model, config.data.max_length)
    return told


def _examples(rows: Sequence[EdgeRows], base: Base, max_length: int) -> list[Examples]:
    """Each edge's; those that name the same file, and write its rows alike, have the same."""
    distinct = {edge.written_alike: edge for edge in rows}
    made = {key: examples_of(one.rows, one.form, base.tokenizer, max_length) for key, one in distinct.items()}
    return [made[edge.written_alike] for edge in rows]


def replanned(job: Job, importance: Importance) -> Job:
    """The same job with the plan that this importance of the weights leads to; where bases run, and in how many bits, does not change."""
    return by_another_plan(job, job.config, importance)


def grown_to(job: Job, rounds_done: int) -> Job:
    """The same job with the plan of the stage after so many rounds."""
    return by_another_plan(job, job.config, None, rounds_done)


def homogeneous(job: Job) -> Job | None:
    """One setting for all edges that can hold it, as methods without a planner have it: [adapter], [train], and the most bits of [plan].

    None where no edge can hold it, or the whole base is in a host that was named.
    """
    if job.split is not None and job.base is job.split.base:
        return None
    config = job.config
    plan = config.plan.model_copy(update={"policy": "as-written", "infeasible": "leave-out", "round_deadline": None})
    plain = {"late": "wait", "min_edges": 1, "aggregation": "exact-svd", "weigh": "rows", "precision": "fp32"}
    federated = config.federated.model_copy(update=plain)
    model = config.model.model_copy(update={"quantize": max(config.plan.bits)})
    edges = tuple(edge.model_copy(update={"mode": "local", "rank": None, "bits": None}) for edge in config.edge)
    try:
        return by_another_plan(
            job, config.model_copy(update={"plan": plan, "federated": federated, "model": model, "edge": edges}), None
        )
    except InfeasibleError:
        return None


def by_another_plan(job: Job, config: RunConfig, importance: Importance | None = None, rounds_done: int = 0) -> Job:
    """The same edges by the plan of another config."""
    known = {edge.name: edge for edge in job.edges}
    config = config.model_copy(update={"edge": tuple(edge for edge in config.edge if edge.name in known)})
    given, planned = config.adapter.start is not None, config
    if job.split is None and all(edge.examples is not None for edge in job.edges):  # No host was started, and none is now.
        here = (edge.model_copy(update={"mode": "local"}) if edge.mode == "auto" else edge for edge in config.edge)
        planned = config.model_copy(update={"edge": tuple(here)})
    ranks, num_rows = block_ranks(job.start, job.shapes) if given else None, {name: edge.num_rows for name, edge in known.items()}
    asked = (planned, job.shapes, num_rows)
    plan = plan_fleet(*asked, start_ranks=ranks, has_host=job.has_host, importance=importance, rounds_done=rounds_done)
    edges = tuple(
        replace(
            participant(config, job.shapes, job.base, one.name, known[one.name].examples, one, known[one.name].num_rows),
            uploaded_bytes=known[one.name].uploaded_bytes,
        ) for one in plan.edges
    )  # fmt: skip
    loaded, start = replace(job.loaded, config=config), job.start if given else with_head(fresh_start(config, job.shapes, plan), job.base)
    return replace(
        job, loaded=loaded, plan=replace(plan, left_out=(*job.plan.left_out, *plan.left_out)), edges=edges, start=start,
        central=None if job.central is None else _central(config, job.shapes, job.base, edges, start),
        # Edges on machines of their own load what they need themselves.
        bases=job.bases if any(edge.examples is None for edge in edges) else _edge_bases(loaded, plan, job.bases),
    )  # fmt: skip


def participant(
    config: RunConfig, shapes: BaseShapes, base: Base, name: str, examples: Examples | None, plan: EdgePlan, num_rows: int = 0
) -> Participant:
    """An edge with the rows it trains on, or with their number where it is on a machine of its own.

    Raises: ConflictError where a window of [select] is as long as its period.
    """
    def stream(batch_size: int) -> BatchStream | None:
        if examples is None:
            return None
        return BatchStream(
            examples, batch_size=batch_size, seed=config.run.seed, edge=name, batching=config.data.batching, pad_id=pad_id(base.tokenizer)
        )

    batches, asked = stream(plan.batch_size), plan.warm_up
    per_epoch = -(-num_rows // plan.batch_size) if batches is None else batches.batches_per_epoch
    selector = selector_of(config, shapes, plan.ranks, edge=name, epoch_steps=-(-per_epoch // plan.accumulate), wire_mode=plan.wire_mode)
    warm_up = None if asked is None else WarmUpPart(stream(asked.batch_size), asked.gradient_checkpointing)
    return Participant(name, examples, batches, plan, selector, warm_up, num_rows)


def _central(config: RunConfig, shapes: BaseShapes, base: Base, edges: Sequence[Participant], start: AdapterState) -> Participant:
    steps = sum(edge.plan.num_steps for edge in edges)
    whole = any(edge.plan.mode != "split" for edge in edges)
    bits = PRECISION_BITS[config.model.precision]
    where = replace(edges[0].plan, mode="local", bits=bits, wire_mode=None, wire_why="") if whole else edges[0].plan
    plan = replace(
        where, name="central", num_steps=steps, ranks=block_ranks(start, shapes), batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
    )  # fmt: skip
    first, *others = (edge.examples for edge in edges if edge.examples is not None)
    return participant(config, shapes, base, "central", first.joined(*others), plan)


def _uploaded_bytes(edge: EdgeRows, plan: EdgePlan) -> int:
    """Bytes of an edge's rows as JSON lines, where it uploads them."""
    if plan.mode != "cloud":
        return 0
    return sum(len(json.dumps(dict(edge.rows[number]), ensure_ascii=False, default=str).encode()) + 1 for number in range(len(edge.rows)))


def _bases(
    loaded: LoadedConfig, plan: FleetPlan, access: HostAccess | None, scores: bool, labels: Sequence[str], opened: ExitStack
) -> tuple[Base, SplitSide | None, Host | None]:
    """The base in this process, and what split edges train on: against the host that was named, or one on loopback that starts here."""
    source, config = base_source(loaded), loaded.config
    modes = {edge.mode for edge in plan.edges}
    # Importance may lead to other batches than were planned without it.
    rows = [*(edge.batch_size for edge in plan.edges), *(config.plan.batch_sizes if config.plan.decides else ())]
    max_tokens = largest_batch_tokens(config, max(rows), scores=scores)
    if access is not None and modes == {"split"}:
        split = join(source, config, access, max_tokens)
        opened.callback(split.close)
        return split.base, split, None
    base = loaded_base(loaded, labels)
    if "split" not in modes:
        return base, None, None
    own_host = None
    if access is None:
        limits = HostLimits(max_tokens=max_tokens, merges=True)
        served = serve(base, source, config.model.precision, PRECISION_BITS[config.model.precision], limits, (config.wire.codec,))
        own_host = start_host(served, limits, "127.0.0.1:0", None)
        opened.callback(own_host.stop)
        access = HostAccess(f"127.0.0.1:{own_host.port}")
    split = join(source, config, access, max_tokens)
    opened.callback(split.close)
    return base, split, own_host


def _edge_bases(loaded: LoadedConfig, plan: FleetPlan, bases: Mapping[int, Base]) -> dict[int, Base]:
    """The base in every width that an edge holds it in; what is loaded already is not loaded again."""
    bases, labels = dict(bases), next(iter(bases.values())).labels
    for bits in sorted({edge.bits for edge in plan.edges if edge.mode == "local"} - set(bases)):
        bases[bits] = loaded_base(loaded, labels, bits)  # type: ignore[arg-type]
    return bases
