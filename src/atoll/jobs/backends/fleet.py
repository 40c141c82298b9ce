"""A run whose edges are on machines of their own: the coordinator knows how many rows they have, and no row."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version

from atoll.base.part import stored_digest
from atoll.config.load import LoadedConfig
from atoll.config.schema import PRECISION_BITS, Edge, RunConfig
from atoll.errors import ConflictError, EdgesLostError, ProtocolError
from atoll.federated.figures import shown
from atoll.federated.flower import ConfigRecord, Grid, Message, MessageType, RecordDict
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.members import with_newcomer, without
from atoll.jobs.backends.work_orders import to_text
from atoll.jobs.backends.worker import Capabilities, asked_for
from atoll.jobs.finished import loaded_base
from atoll.jobs.inputs import base_shapes, base_source, check_labels, class_events, eval_rows, given_importance, held_out_events
from atoll.jobs.job import Job, Participant, participant
from atoll.jobs.ready.forms import unlike_kinds
from atoll.jobs.ready.start import block_ranks, fresh_start, given_start, with_head
from atoll.jobs.results.adapter import check_given, check_result
from atoll.planner.edge_plan import FleetPlan, LeftOut
from atoll.planner.plan_fleet import check_plan, plan_fleet
from atoll.runs.events import Advised, Event, EventLog
from atoll.runs.tracker import check_trackers
from atoll.selection.selector import schedule_of
from atoll.shapes import BaseShapes
from atoll.tasks.classes import form_of
from atoll.tasks.evaluate import check_metrics, held_out_examples
from atoll.tasks.forms.values import in_order
from atoll.tasks.text import TextForm
from atoll.units import format_seconds

CAPABILITIES, TEXT = "capabilities", "text"
"""Flower's name for the question what an edge has, and of the record that answers it; key of the text there and in work orders."""
FINISHED, ROUNDS = "finished", "rounds"
"""Name of the word that a run is complete, and key of the number of its rounds."""
_MOST_TOLD = 20
"""Edges of which it is told why they cannot take part."""


class Members:
    """Who could come while a run goes on, and who is gone: the edges of run.toml that were not there when it began are asked again."""

    def __init__(self, config: RunConfig, grid: Grid, absent: Mapping[int, str], gone: Collection[str]) -> None:
        self.config, self.gone = config, gone
        self._grid, self._absent = grid, dict(absent)
        self._asked = list(grid.push_messages(_questions(absent))) if absent else []

    def arrived(self) -> dict[int, Capabilities | str]:
        """By node, what those say that answered since, or why that cannot be used. They are not asked again."""
        found = dict(_read_capabilities(self._grid.pull_messages(self._asked))) if self._asked else {}
        return {node: said for node, said in found.items() if node in self._absent}


class FleetBackend:
    """A backend on machines of its own, which keep their own states; `grid` reaches the nodes of its edges."""

    def __init__(self, job: Job, grid: Grid, nodes: Mapping[int, str], members: Members | None = None, log: EventLog | None = None) -> None:
        self._grid, self._nodes, self._members, self._log = grid, dict(nodes), members, log
        # An edge that holds a part of the base is checked by its host.
        whole = {edge.name for edge in job.edges if edge.plan.mode != "split"}
        digest = stored_digest(base_source(job.loaded))
        self._digests = {name: digest for name in self._nodes.values() if name in whole}
        self._orders: dict[str, ConfigRecord] = {}

    @property
    def nodes(self) -> Mapping[int, str]:
        """The edges' names by node."""
        return self._nodes

    @property
    def base_digests(self) -> Mapping[str, str]:
        """Of the coordinator's own base, for edges that hold all of it."""
        return self._digests

    @property
    def grid(self) -> Grid:
        """What carries messages to them."""
        return self._grid

    def changed(self, job: Job, number: int) -> Job | None:
        """With edges that came since the last round, and without those that were removed from the fleet."""
        if self._members is None:
            return None
        found = job
        for name in [edge.name for edge in job.edges if edge.name in self._members.gone]:
            if len(found.edges) > 1:
                found = without(found, name, number)
                self._tell(name, f"it left for good; round {number} begins without it")
        for node, said in self._members.arrived().items():
            found = self._with(found, node, said, number)
        return None if found is job else found

    def _with(self, job: Job, node: int, said: Capabilities | str, number: int) -> Job:
        assert self._members is not None
        config = self._members.config
        edge = next((one for one in config.edge if isinstance(said, Capabilities) and one.name == said.edge), None)
        if edge is None or not isinstance(said, Capabilities):
            self._tell("", f"somebody came who cannot take part: {said if isinstance(said, str) else shown(said.edge)}")
            return job
        ours = Capabilities("", 0, "", (), stored_digest(base_source(job.loaded)), job.asked_for, version("atoll"))
        why = differs(ours, said)
        if why is None and not set(said.labels) <= set(job.base.labels):
            why = f"classes that the run does not have: {shown(sorted(set(said.labels) - set(job.base.labels))[:3])}"
        brings = replace(job.edges[0], name=edge.name, examples=None, batches=None, num_rows=said.num_rows)
        found = why or with_newcomer(job, edge, brings, [one.name for one in config.edge])
        if isinstance(found, str):
            self._tell(edge.name, f"it came before round {number}, and takes part in the next run: {found}")
            return job
        self._nodes[node] = edge.name
        if next(one.plan.mode for one in found.edges if one.name == edge.name) != "split":
            self._digests[edge.name] = ours.base
        self._tell(edge.name, f"it takes part from round {number} on")
        return found

    def _tell(self, edge: str, what: str) -> None:
        if self._log is not None:
            self._log.append(Advised(edge, what))

    def give(self, job: Job, edges: Sequence[Participant], orders: Sequence[WorkOrder]) -> None:
        """Have each work order go with the next message to its edge."""
        self._orders = {order.edge: ConfigRecord({TEXT: to_text(order, job.plan.pool, job.base.labels, job.run_id)}) for order in orders}

    def work_order_record(self, node: int) -> ConfigRecord | None:
        """The work order of this node's edge."""
        return self._orders[self._nodes[node]]

    def save(self, folder: object) -> None:
        """Nothing: the edges keep the last rounds themselves."""

    def restore(self, folder: object) -> None:
        """Nothing: an edge goes on from the round before the one that it is asked for."""

    def close(self) -> None:
        """Nothing is open."""


def ask_capabilities(grid: Grid, nodes: Mapping[int, str], timeout: float) -> tuple[list[Capabilities], dict[str, str]]:
    """What the edges on these nodes say of themselves, in the order of their names; and of those that cannot be used, why."""
    found, silent = dict[str, Capabilities](), dict.fromkeys(nodes.values(), f"no answer in {format_seconds(timeout)}")
    for node, reply in _answers(grid, nodes, timeout):
        edge = nodes[node]
        if isinstance(reply, str):
            silent[edge] = reply
        elif reply.edge != edge:
            silent[edge] = f"it says that it is {shown(reply.edge)}, whose key it has not: copy the folder of every edge to its own machine"
        else:
            found[edge] = reply
            del silent[edge]
    return [found[edge] for edge in sorted(found)], silent


def tell_finished(grid: Grid, nodes: Collection[int], rounds: int, timeout: float) -> None:
    """Tell the edges on these nodes that the run is complete; none that is silent is waited for longer."""
    content = RecordDict({FINISHED: ConfigRecord({ROUNDS: rounds})})
    for _ in grid.send_and_receive(
        [Message(content, node, f"{MessageType.QUERY}.{FINISHED}", group_id="0") for node in nodes], timeout=timeout
    ):  # fmt: skip
        pass


def named(grid: Grid, nodes: Collection[int], timeout: float) -> dict[int, str]:
    """The edges' names by node, as they say them; a node without an answer that can be used is left out, as is the second of one name."""
    said = {node: reply.edge for node, reply in _answers(grid, nodes, timeout) if not isinstance(reply, str)}
    first: dict[str, int] = {}
    for node in sorted(said):
        first.setdefault(said[node], node)
    return {node: edge for edge, node in first.items()}


def _answers(grid: Grid, nodes: Collection[int], timeout: float) -> Iterator[tuple[int, Capabilities | str]]:
    """What the nodes say of themselves, or why that cannot be used, as it comes."""
    yield from _read_capabilities(grid.send_and_receive(_questions(nodes), timeout=timeout))


def _questions(nodes: Collection[int]) -> list[Message]:
    return [Message(RecordDict(), node, f"{MessageType.QUERY}.{CAPABILITIES}", group_id="0") for node in nodes]


def _read_capabilities(replies: Iterable[Message]) -> Iterator[tuple[int, Capabilities | str]]:
    for reply in replies:
        node = reply.metadata.src_node_id
        if reply.has_error():
            yield node, reply.error.reason or f"code {reply.error.code}"
            continue
        try:
            yield node, Capabilities.from_text(str(reply.content.config_records.get(CAPABILITIES, ConfigRecord()).get(TEXT)))
        except ProtocolError as problem:
            yield node, problem.page()


def differs(ours: Capabilities, theirs: Capabilities, overrides: Sequence[str] = ()) -> str | None:
    """Why an edge would run something else than the coordinator, which was given these overrides; None: it would not."""
    typed = [f"--set {shlex.quote(one)}" for one in overrides]
    same = f"give its `atoll fleet join` {' '.join(typed)}, too, and " if typed else ""
    for what, key, do in (
        ("version of Atoll", "atoll", "install the same version everywhere"),
        ("run.toml", "config", f"{same}copy the run.toml that the coordinator has, or its run began with, to it"),
        ("base", "base", "give it the same files of the base model"),
    ):
        expected, got = getattr(ours, key), getattr(theirs, key)
        # An edge that only ever holds a part of the base shows no digest of it.
        if got != expected and (key != "base" or got):
            return f"another {what} than the coordinator's: {shown(got[:12])}, not {expected[:12]!r}; {do}"
    return None


def prepared_for_fleet(
    loaded: LoadedConfig, all_capabilities: Sequence[Capabilities], silent: Mapping[str, str], run_id: str, asked: str = ""
) -> Job:
    """Everything that a coordinator needs; `silent` edges, given with why, are left out, and those that would run something else.

    `asked` is the digest of what edges must run where this config has not all of them any more.

    Raises: InputError leaves for what the user must mend; InfeasibleError where an edge cannot hold the plan; EdgesLostError where too few
    are there.
    """
    config = loaded.config
    check_trackers(config.track.to)
    if "central" in config.run.compare:
        raise ConflictError(
            "the rows of a fleet stay where they are", where="[run] compare", got='"central": one trainer that sees all rows',
            expected='"local-only" or "homogeneous"', do="remove it, or run without --engine flower where all rows are",
        )  # fmt: skip
    ours = Capabilities("", 0, "", (), stored_digest(base_source(loaded)), asked or asked_for(config), version("atoll"))
    others = {one.edge: why for one in all_capabilities if (why := differs(ours, one, loaded.overrides)) is not None}
    known = {one.edge: one for one in all_capabilities if one.edge not in others}
    silent = {**silent, **others}
    if len(known) < max(1, config.federated.min_edges):
        raise EdgesLostError(
            "too few edges can take part",
            got="; ".join([f"{len(known)} of {len(config.edge)}", *(f"{e}: {why}" for e, why in list(silent.items())[:_MOST_TOLD])]),
            expected=f"at least {config.federated.min_edges} ([federated] min_edges)",
            do="start `atoll fleet join` on the others, mend what is said of them, and try again",
        )  # fmt: skip
    fewer = replace(loaded, config=config.model_copy(update={
        "edge": tuple(_placed(config, edge, known[edge.name]) for edge in config.edge if edge.name in known),
    }))  # fmt: skip
    labels, shapes, plan = _planned(fewer, known)
    short = _too_short(config, plan, known)
    if short and len(short) < len(plan.edges):
        left = [one for one in known.values() if one.edge not in short]
        return prepared_for_fleet(loaded, left, {**silent, **short}, run_id, asked)
    plan = replace(plan, left_out=(*(LeftOut(edge, why) for edge, why in silent.items()), *plan.left_out))
    return replace(_prepared(fewer, known, labels, shapes, plan), run_id=run_id, asked_for=ours.config)


def _placed(config: RunConfig, edge: Edge, capabilities: Capabilities) -> Edge:
    """An edge that knows no host is offered none by a planner."""
    undecided = edge.mode == "auto" and config.run.placement == "auto" and config.plan.decides
    return edge.model_copy(update={"mode": "local"}) if undecided and not capabilities.knows_host else edge


def _planned(loaded: LoadedConfig, known: Mapping[str, Capabilities]) -> tuple[tuple[str, ...], BaseShapes, FleetPlan]:
    """The classes of the run, the base's shapes with a head for them, and what all edges are to do."""
    config = loaded.config
    given_labels = tuple(label.strip() for label in config.evaluate.labels or ())
    labels = given_labels or in_order(label for capabilities in known.values() for label in capabilities.labels)
    labels = labels if config.model.task == "classify" else ()
    check_labels(config, labels)
    shapes = base_shapes(loaded, len(labels))
    given, num_rows = given_start(loaded, shapes), {edge: capabilities.num_rows for edge, capabilities in known.items()}
    return labels, shapes, plan_fleet(
        config, shapes, num_rows, start_ranks=block_ranks(given, shapes) if given else None, importance=given_importance(loaded),
    )  # fmt: skip


def _too_short(config: RunConfig, plan: FleetPlan, known: Mapping[str, Capabilities]) -> dict[str, str]:
    """Edges that say they have too few rows for a window of observation, and why."""
    found = {}
    for edge, per_step in plan.rows_per_step.items():
        try:
            schedule_of(config.select, -(-known[edge].num_rows // per_step), options=config.options_of(config.select.policy), edge=edge)
        except ConflictError as problem:
            found[edge] = problem.page()
    return found


def _prepared(
    loaded: LoadedConfig, known: Mapping[str, Capabilities], labels: tuple[str, ...], shapes: BaseShapes, plan: FleetPlan
) -> Job:
    config, held_out = loaded.config, eval_rows(loaded)
    form = None if held_out is None else form_of(config.data, held_out, labels)
    if held_out is not None and form is not None:
        check_metrics(config.evaluate, form, held_out)
    check_plan(config, plan)
    base, given = loaded_base(loaded, labels), given_start(loaded, shapes)
    kinds = {one.name: known[one.name].form for one in plan.edges}
    scored, events = None, list[Event]((*class_events(config, labels), *unlike_kinds(kinds)))
    if held_out is not None and form is not None:
        scored = held_out_examples(held_out, form, base.tokenizer, config.evaluate, config.data.max_length, config.options)
        events += held_out_events(held_out, form, scored)
    if form is None and set(kinds.values()) == {"messages"}:
        form = TextForm("messages")  # Of the edges' rows: what is said to the result is put into the chat template.
    edges = tuple(participant(config, shapes, base, one.name, None, one, known[one.name].num_rows) for one in plan.edges)
    start = with_head(given or fresh_start(config, shapes, plan), base)
    if config.adapter.start is not None:
        check_given(loaded.resolve(config.adapter.start), base)
    check_result(base, start, loaded)
    bases = {PRECISION_BITS[config.model.precision]: base}
    return Job(loaded, base, bases, shapes, form, edges, None, held_out, plan, start, tuple(events), False, None, None, scored)
