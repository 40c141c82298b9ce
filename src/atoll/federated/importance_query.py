"""The coordinator asks every edge how important each module is, on the edge's own data: a Flower query, beside the rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from atoll.adapters.state import AdapterState
from atoll.cost.meters import PeakMemory
from atoll.cost.traffic import WireAccount
from atoll.cost.work import Work
from atoll.errors import AdapterFitError, EdgesLostError, UpdateRefusedError
from atoll.federated.aggregation.edge_parts import Precision
from atoll.federated.checks import check_contents, check_examples
from atoll.federated.figures import counter, finite_number, reading, shown, whole_number, work_of
from atoll.federated.flower import ConfigRecord, Grid, Message, MessageType, MetricRecord, RecordDict
from atoll.federated.payload import ADAPTER, WORK_ORDER, get_adapter, num_bytes, put_adapter
from atoll.training.importance_warmup import ModuleScores
from atoll.training.trainer import StepReport
from atoll.units import counted

_SCORES, _FIGURES = "scores", "metrics"
_ANSWER = frozenset({_SCORES, _FIGURES, "wire_up", "wire_down"})
"""What an answer may hold."""


@dataclass(frozen=True, slots=True, eq=False)
class EdgeWarmUp:
    """What an edge brings to the question."""

    warm_up: Callable[[AdapterState | None], ModuleScores]
    """Scores the modules, from the base with the common adapter; None: from the base alone."""
    work_of: Callable[[StepReport], Work]
    """What a step cost, by formula."""


@dataclass(frozen=True, slots=True)
class EdgeScores:
    """One edge's answer."""

    edge: str
    num_examples: int
    scores: Mapping[str, float]
    """By module; finite, and not below zero."""
    work: Work
    """By formula."""
    peak_bytes: int
    up_bytes: int
    """Of the answer, and of the exchanges with a host where there is one."""
    down_bytes: int
    wire: WireAccount
    """Of these, the exchanges with a host, by message kind."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Asked:
    """All answers that can be used, in the order they came, and why others cannot."""

    edges: tuple[EdgeScores, ...]
    left_out: Mapping[str, str]
    seconds: float


def ask_importance(
    grid: Grid, nodes: Mapping[int, str], modules: Collection[str], *, adapter: AdapterState | None = None, round_number: int = 0,
    timeout: float | None = None, work_order_of: Callable[[int], ConfigRecord | None] = lambda node: None, precision: Precision = "fp32",
) -> Asked:  # fmt: skip
    """Have these nodes, given with their edges' names, score the modules; an edge with an answer that cannot be used is left out.

    `adapter` is the common one to score from, which travels in this `precision`; None: nothing was trained yet. `timeout` in seconds.
    `work_order_of` a node is what a message must tell its edge beside the adapter.

    Raises: EdgesLostError where nobody is left.
    """
    begin, sent = time.monotonic(), dict[int, tuple[float, int]]()
    known = frozenset(modules)

    def messages() -> Iterator[Message]:
        for node in nodes:
            content = RecordDict()
            if adapter is not None:
                put_adapter(content, adapter, ADAPTER, precision)
            if (order := work_order_of(node)) is not None:
                content[WORK_ORDER] = order
            sent[node] = (time.monotonic(), num_bytes(content))
            yield Message(content, node, MessageType.QUERY, group_id=str(round_number))

    found, reasons = list[EdgeScores](), list[str]()
    left_out = dict.fromkeys(nodes.values(), "no answer in time")
    for reply in grid.send_and_receive(messages(), timeout=timeout):
        node = reply.metadata.src_node_id
        started, down_bytes = sent[node]
        try:
            with reading(nodes[node]):
                found.append(_read(nodes[node], reply, known, down_bytes, time.monotonic() - started))
        except (UpdateRefusedError, AdapterFitError) as problem:
            left_out[nodes[node]] = problem.page()
            reasons.append(f"{nodes[node]}: {problem.got.splitlines()[0] if problem.got else problem.what}")
        else:
            del left_out[nodes[node]]
    if not found:
        raise EdgesLostError(
            "no edge found the importance of the modules", got="; ".join([f"0 of {counted(len(nodes), 'edge')}", *reasons[:3]]),
            expected="at least one", do='mend what the edges report, or set plan.importance = "none"',
        )  # fmt: skip
    return Asked(tuple(found), left_out, time.monotonic() - begin)


def answer_importance(
    edge: str, importance_warm_up: EdgeWarmUp | None, num_examples: int, account: WireAccount, message: Message, *, crosses: bool
) -> Message:
    """The edge's side; `crosses`: whether messages really go between two machines.

    Raises: UpdateRefusedError for an edge that has no warm-up.
    """
    if importance_warm_up is None:
        raise UpdateRefusedError("the edge does not score modules", where=f"edge {edge}", got="no warm-up", expected="one on its data")
    before = account.copy()
    with PeakMemory() as peak:
        module_scores = importance_warm_up.warm_up(get_adapter(message.content, ADAPTER) if ADAPTER in message.content else None)
    work = sum((importance_warm_up.work_of(report) for report in module_scores.reports), Work())
    crossed = account.since(before)
    return Message(RecordDict({
        _SCORES: MetricRecord(dict(module_scores.scores)),
        _FIGURES: MetricRecord({
            "num_examples": num_examples, "peak_bytes": peak.num_bytes, "crosses": int(crosses), **work.to_numbers(),
        }),
        "wire_up": MetricRecord(dict(crossed.sent)), "wire_down": MetricRecord(dict(crossed.received)),
    }), reply_to=message)  # fmt: skip


def _read(edge: str, reply: Message, modules: frozenset[str], down_bytes: int, seconds: float) -> EdgeScores:
    if reply.has_error():
        raise UpdateRefusedError("the edge reported an error", where=f"edge {edge}", got=reply.error.reason or f"code {reply.error.code}")
    check_contents(edge, reply.content, _ANSWER, {}, len(modules))
    records = reply.content.metric_records
    figures = records[_FIGURES]
    num_examples, crosses = whole_number(figures, "num_examples"), bool(whole_number(figures, "crosses"))
    check_examples(edge, num_examples, None)
    up, down = (counter(records[kind]) for kind in ("wire_up", "wire_down"))
    return EdgeScores(
        edge, num_examples, _checked(records[_SCORES], modules), work_of(figures), whole_number(figures, "peak_bytes"),
        (num_bytes(reply.content) if crosses else 0) + up.total(), (down_bytes if crosses else 0) + down.total(), WireAccount(up, down),
        seconds,
    )  # fmt: skip


def _checked(record: MetricRecord, modules: frozenset[str]) -> dict[str, float]:
    if not record:
        raise ValueError("no score at all")
    scores = {}
    for name in record:
        if name not in modules:
            raise ValueError(f"a score of {shown(name)}, which is no module of this run")
        scores[name] = finite_number(record, name)
        if scores[name] < 0:
            raise ValueError(f"{scores[name]} for {name}")
    return scores
