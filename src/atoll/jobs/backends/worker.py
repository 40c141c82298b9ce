"""An edge on a machine of its own: its rows, read once, and the base in the form that its plan asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from atoll.adapters.state import AdapterState
from atoll.base.load import Base
from atoll.base.part import stored_digest
from atoll.config.load import LoadedConfig, resolved
from atoll.config.schema import PRECISION_BITS, RunConfig
from atoll.cost.split_traffic import largest_batch_tokens
from atoll.errors import HostRefusedError
from atoll.jobs.backends.edge_policy import EdgePolicy
from atoll.jobs.backends.order_checks import OrderChecks
from atoll.jobs.backends.work_orders import SentOrder, read_strictly
from atoll.jobs.finished import loaded_base
from atoll.jobs.inputs import alone, base_shapes, base_source, edge_rows, labels_of, token_events
from atoll.jobs.job import Job, Participant, participant
from atoll.jobs.split import HostAccess, SplitSide, join
from atoll.planner.edge_plan import EdgePlan, FleetPlan
from atoll.runs.events import Event
from atoll.tasks.batches import check_packing
from atoll.tasks.classes import examples_of, with_classes
from atoll.tasks.tokens import Examples
from atoll.units import counted

_LONGEST_NAME, _LONGEST_LABEL, _MOST_LABELS = 128, 1000, 10_000
_OF_A_MACHINE = (("model", "base"), ("data", "train"), ("data", "eval"), ("adapter", "start"), ("plan", "importance_file"),
                 ("track", "to"), ("track", "project"))  # fmt: skip
"""Keys that name places on a machine, or whom it tells, and may differ between those of one run."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an edge says of itself before a run: no row and no weight."""

    edge: Annotated[str, Field(max_length=_LONGEST_NAME)]
    num_rows: Annotated[int, Field(ge=0, le=2**40)]
    form: Annotated[str, Field(max_length=_LONGEST_NAME)]
    """What its rows are: "completion", "text" or "messages"."""
    labels: Annotated[tuple[Annotated[str, Field(max_length=_LONGEST_LABEL)], ...], Field(max_length=_MOST_LABELS)]
    """The classes of its rows; none where it generates."""
    base: Annotated[str, Field(max_length=_LONGEST_NAME)]
    """Digest of the weights as they are stored."""
    config: Annotated[str, Field(max_length=_LONGEST_NAME)]
    """Digest of what run.toml asks for, wherever files lie."""
    atoll: Annotated[str, Field(max_length=_LONGEST_NAME)]
    knows_host: bool = False
    """Whether it can train against one."""

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Capabilities:
        """What `to_text` wrote.

        Raises: ProtocolError for a text of another version.
        """
        return read_strictly(TypeAdapter(cls), text, "an edge's answer")


def asked_for(config: RunConfig) -> str:
    """SHA-256 of what a config asks for: equal on all machines of a run, wherever its files lie on them."""
    values: Any = resolved(config)
    for section, key in _OF_A_MACHINE:
        values[section][key] = None
    values["run"]["fleet"] = None
    for edge in values["edge"]:
        edge |= {"data": None, "profile": None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Worker:
    """One edge's side of a run. A base is loaded when a work order first asks for it, and let go when one asks for another."""

    def __init__(self, loaded: LoadedConfig, edge: str, host: HostAccess | None = None, policy: EdgePolicy | None = None) -> None:
        self._loaded, self._name, self._host = alone(loaded, edge), edge, host
        self.of_all = loaded
        """run.toml as it is for all edges."""
        self.policy = policy or EdgePolicy()
        """What the edge's owner lets a coordinator ask for, beside what run.toml says."""
        self._asked_for = asked_for(loaded.config)
        (self._rows,) = edge_rows(loaded, edge)
        self._labels = labels_of(self._loaded.config, [self._rows.rows])
        own = next(one for one in loaded.config.edge if one.name == edge)
        self._checks = OrderChecks(loaded.config, own, len(self._rows.rows), self._labels, self.policy)
        self._base: Base | None = None
        self._split: SplitSide | None = None
        self._has: object = None
        self._examples: tuple[tuple[str, ...], Examples] | None = None
        """By the classes of the run, whose numbers they hold: another run may have more."""
        self._untold: tuple[Event, ...] = ()

    @property
    def config(self) -> RunConfig:
        """What this edge's own run.toml says."""
        return self._loaded.config

    @property
    def name(self) -> str:
        """The edge's."""
        return self._name

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided about its rows that its owner should hear."""
        skipped = self._rows.rows.num_skipped
        unusable = [f"left out, as it cannot be used: {counted(skipped, 'row')}"] if skipped else []
        return (*(note for _, note in self._rows.notes), *unusable)

    def untold(self) -> tuple[Event, ...]:
        """What became of the rows as tokens were made of them; once."""
        told, self._untold = self._untold, ()
        return told

    def capabilities(self) -> Capabilities:
        """What the coordinator may know."""
        return Capabilities(
            self._name, len(self._rows.rows), self._rows.form.kind, self._labels, self.digest, self._asked_for, version("atoll"),
            self._host is not None,
        )  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """Of the base as it is stored here; empty for an edge that only ever holds a part of it, which its host checks."""
        return "" if self._loaded.config.edge[0].mode == "split" else stored_digest(base_source(self._loaded))

    def check(self, sent: SentOrder, task: str, number: int | None = None, adapter: AdapterState | None = None) -> None:
        """Whether an order may be followed, to train this adapter in this round; nothing is loaded for it.

        Raises: OrderRefusedError.
        """
        self._checks.check(sent, task, number, base_shapes(self._loaded, len(sent.labels)))
        if adapter is not None:
            self._checks.check_adapter(adapter, sent)

    def work(self, sent: SentOrder) -> tuple[Job, Participant]:
        """All that the edge's part of the run needs, by this work order.

        Raises: what loading a base raises; HostRefusedError where blocks are to run in a host and none is known.
        """
        config, plan = self._loaded.config, sent.order.plan
        shapes = base_shapes(self._loaded, len(sent.labels))
        base = self._base_for(plan, sent.labels)
        form = with_classes(self._rows.form, config.data.label, sent.labels)
        if self._examples is None or self._examples[0] != sent.labels:
            if config.data.batching == "pack":
                check_packing(base.model, config.data.max_length)
            self._examples = sent.labels, examples_of(self._rows.rows, form, base.tokenizer, config.data.max_length)
            self._untold = token_events(self._rows, self._examples[1], base.tokenizer)
        fleet = FleetPlan((plan,), config.run.rounds, 0, shapes.num_parameters, None, 0, 0, pool=sent.pool)
        edge = participant(config, shapes, base, self._name, self._examples[1], plan, len(self._rows.rows))
        job = Job(
            self._loaded, base, {plan.bits: base}, shapes, form, (edge,), None, None, fleet, AdapterState("lora", {}), (),
            self._host is not None, self._split, None,
        )  # fmt: skip
        return job, edge

    def close(self) -> None:
        """End the session with the host, if there is one."""
        if self._split is not None:
            self._split.close()
            self._split = None

    def _base_for(self, plan: EdgePlan, labels: Sequence[str]) -> Base:
        wanted = (plan.mode, plan.bits, tuple(labels))
        if self._base is None or self._has != wanted:
            self.close()
            self._base = None  # Before another is loaded: two may not fit.
            self._base, self._has = self._load(plan, labels), wanted
        return self._base

    def _load(self, plan: EdgePlan, labels: Sequence[str]) -> Base:
        config = self._loaded.config
        if plan.mode != "split":
            full = plan.bits == PRECISION_BITS[config.model.precision]
            return loaded_base(self._loaded, labels, None if full else plan.bits)  # type: ignore[arg-type]
        if self._host is None:
            raise HostRefusedError(
                "this edge knows no host", where=f"edge {self._name}", got="a plan by which blocks of the base run in a host",
                expected="the host's address in edge.json", do="write the fleet's folder again with --host HOST:PORT",
            )  # fmt: skip
        max_tokens = largest_batch_tokens(config, max(plan.batch_size, *config.plan.batch_sizes), scores=False)
        self._split = join(base_source(self._loaded), config, self._host, max_tokens)
        return self._split.base
