"""A run whose edges are on machines of their own: the coordinator knows how many rows they have, and no row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version

from atoll.base.part import stored_digest
from atoll.config.load import LoadedConfig
from atoll.config.schema import PRECISION_BITS
from atoll.errors import ConflictError, EdgesLostError, ProtocolError
from atoll.federated.flower import ConfigRecord, Grid, Message, MessageType, RecordDict
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.work_orders import to_text
from atoll.jobs.backends.worker import Capabilities, asked_for
from atoll.jobs.finished import loaded_base
from atoll.jobs.inputs import base_shapes, base_source, check_labels, eval_rows, given_importance
from atoll.jobs.job import Job, Participant, block_ranks, fresh_start, given_start, participant, with_head
from atoll.planner.edge_plan import LeftOut
from atoll.planner.plan_fleet import check_plan, plan_fleet
from atoll.selection.selector import check_schedules
from atoll.tasks.classes import form_of
from atoll.tasks.evaluate import check_metrics
from atoll.units import format_seconds

CAPABILITIES, TEXT = "capabilities", "text"
"""Flower's name for the question what an edge has, and of the record that answers it; key of the text there and in work orders."""


class FleetBackend:
    """A backend on machines of its own, which keep their own states; `grid` reaches the nodes of its edges."""

    def __init__(self, job: Job, grid: Grid, nodes: Mapping[int, str]) -> None:
        self._grid, self._nodes = grid, dict(nodes)
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
    """What the edges on these nodes say of themselves, in the order of their names; and of those that say nothing in time, why."""
    found, silent = dict[str, Capabilities](), dict.fromkeys(nodes.values(), f"no answer in {format_seconds(timeout)}")
    for reply in grid.send_and_receive([_capabilities_request(node) for node in nodes], timeout=timeout):
        edge = nodes[reply.metadata.src_node_id]
        if reply.has_error():
            silent[edge] = reply.error.reason or f"code {reply.error.code}"
            continue
        found[edge] = _said(reply, f"edge {edge}")
        if found[edge].edge != edge:
            raise ConflictError(
                "an edge has another's key", where=edge, got=f"it says that it is {found[edge].edge}", expected=edge,
                do="copy the folder of every edge to its own machine",
            )  # fmt: skip
        del silent[edge]
    return [found[edge] for edge in sorted(found)], silent


def named(grid: Grid, nodes: Collection[int], timeout: float) -> dict[int, str]:
    """The edges' names by node, as they say them; nodes that say nothing in time are left out."""
    replies = grid.send_and_receive([_capabilities_request(node) for node in nodes], timeout=timeout)
    heard = {reply.metadata.src_node_id: reply for reply in replies if not reply.has_error()}
    return {node: _said(reply, f"node {node}").edge for node, reply in heard.items()}


def _capabilities_request(node: int) -> Message:
    return Message(RecordDict(), node, f"{MessageType.QUERY}.{CAPABILITIES}", group_id="0")


def _said(reply: Message, who: str) -> Capabilities:
    try:
        return Capabilities.from_text(str(reply.content.config_records.get(CAPABILITIES, ConfigRecord()).get(TEXT)))
    except ProtocolError as problem:
        problem.where = who
        raise


def check_capabilities(loaded: LoadedConfig, all_capabilities: Sequence[Capabilities]) -> None:
    """Whether all edges are about to run the same thing.

    Raises: ConflictError naming all that are not.
    """
    of_all = (
        ("version of Atoll", version("atoll"), lambda one: one.atoll, "install the same version everywhere"),
        ("run.toml", asked_for(loaded.config), lambda one: one.config, "copy the coordinator's run.toml to them"),
        # An edge that only ever holds a part of the base shows no digest of it.
        ("base", own := stored_digest(base_source(loaded)), lambda one: one.base or own, "give them the same files of the base model"),
    )
    for what, expected, of, do in of_all:
        other = sorted((capabilities.edge, of(capabilities)[:12]) for capabilities in all_capabilities if of(capabilities) != expected)
        if other:
            raise ConflictError(
                f"edges have another {what} than the coordinator", where=", ".join(edge for edge, _ in other),
                got="; ".join(said for _, said in other), expected=expected[:12], do=do,
            )  # fmt: skip


def prepared_for_fleet(loaded: LoadedConfig, all_capabilities: Sequence[Capabilities], silent: Mapping[str, str], run_id: str) -> Job:
    """Everything that a coordinator needs; `silent` edges, given with why, are left out.

    Raises: InputError leaves for what the user must mend; InfeasibleError where an edge cannot hold the plan; EdgesLostError where too few
    are there.
    """
    config = loaded.config
    if "central" in config.run.compare:
        raise ConflictError(
            "the rows of a fleet stay where they are", where="[run] compare", got='"central": one trainer that sees all rows',
            expected='"local-only" or "homogeneous"', do="remove it, or run without --engine flower where all rows are",
        )  # fmt: skip
    known = {capabilities.edge: capabilities for capabilities in all_capabilities}
    if len(known) < max(1, config.federated.min_edges):
        raise EdgesLostError(
            "too few edges answered", got="; ".join([f"{len(known)} of {len(config.edge)}", *(f"{e}: {why}" for e, why in silent.items())]),
            expected=f"at least {config.federated.min_edges} ([federated] min_edges)",
            do="start `atoll fleet join` on the others, and try again",
        )  # fmt: skip
    check_capabilities(loaded, all_capabilities)
    loaded = replace(loaded, config=config.model_copy(update={"edge": tuple(edge for edge in config.edge if edge.name in known)}))
    return replace(_prepared(loaded, known, tuple(LeftOut(edge, why) for edge, why in silent.items())), run_id=run_id)


def _prepared(loaded: LoadedConfig, known: Mapping[str, Capabilities], silent: Sequence[LeftOut]) -> Job:
    config = loaded.config
    labels = config.evaluate.labels or tuple(sorted({label for capabilities in known.values() for label in capabilities.labels}))
    labels = labels if config.model.task == "classify" else ()
    check_labels(config, labels)
    shapes = base_shapes(loaded, len(labels))
    held_out = eval_rows(loaded)
    form = None if held_out is None else form_of(config.data, held_out, labels)
    if held_out is not None and form is not None:
        check_metrics(config.evaluate, form, held_out)
    given, num_rows = given_start(loaded, shapes), {edge: capabilities.num_rows for edge, capabilities in known.items()}
    plan = plan_fleet(
        config, shapes, num_rows, start_ranks=block_ranks(given, shapes) if given else None, importance=given_importance(loaded),
    )  # fmt: skip
    check_schedules(config, plan.rows_per_step, num_rows)
    check_plan(config, plan)
    base = loaded_base(loaded, labels)
    edges = tuple(participant(config, shapes, base, one.name, None, one, num_rows[one.name]) for one in plan.edges)
    start = with_head(given or fresh_start(config, shapes, plan), base)
    plan = replace(plan, left_out=(*silent, *plan.left_out))
    bases = {PRECISION_BITS[config.model.precision]: base}
    return Job(loaded, base, bases, shapes, form, edges, None, held_out, plan, start, (), False, None, None)
