"""The coordinator asks every edge how important each module is, on the edge's own data: a Flower query, beside the rounds."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from atoll.adapters.state import AdapterState
from atoll.cost.meters import PeakMemory
from atoll.cost.traffic import WireAccount
from atoll.cost.work import Work
from atoll.errors import AdapterFitError, EdgesLostError, UpdateRefusedError
from atoll.federated.aggregation.edge_parts import Precision
from atoll.federated.checks import whole_number
from atoll.federated.flower import ConfigRecord, Grid, Message, MessageType, MetricRecord, RecordDict
from atoll.federated.payload import WORK_ORDER, get_adapter, num_bytes, put_adapter
from atoll.training.importance_warmup import ModuleScores
from atoll.training.trainer import StepReport

_ADAPTER, _SCORES, _FIGURES = "adapter", "scores", "metrics"


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
                put_adapter(content, adapter, _ADAPTER, precision)
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
            found.append(_read(nodes[node], reply, known, down_bytes, time.monotonic() - started))
        except (UpdateRefusedError, AdapterFitError) as problem:
            left_out[nodes[node]] = problem.page()
            reasons.append(f"{nodes[node]}: {problem.got.splitlines()[0] if problem.got else problem.what}")
        else:
            del left_out[nodes[node]]
    if not found:
        raise EdgesLostError(
            "no edge found the importance of the modules", got="; ".join([f"0 of {len(nodes)} edges", *reasons[:3]]),
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
        module_scores = importance_warm_up.warm_up(get_adapter(message.content, _ADAPTER) if _ADAPTER in message.content else None)
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
    where = f"edge {edge}"
    if reply.has_error():
        raise UpdateRefusedError("the edge reported an error", where=where, got=reply.error.reason or f"code {reply.error.code}")
    records = reply.content.metric_records
    try:
        figures = records[_FIGURES]
        work, counts = Work.from_numbers(figures), {key: whole_number(figures, key) for key in ("num_examples", "peak_bytes", "crosses")}
        up, down = (Counter({key: whole_number(records[kind], key) for key in records[kind]}) for kind in ("wire_up", "wire_down"))
        scores = _checked(records[_SCORES], modules)
        if counts["num_examples"] < 1:
            raise ValueError(f"{counts['num_examples']} examples")
    except (KeyError, TypeError, ValueError) as problem:
        got = f"no {problem.args[0]}" if isinstance(problem, KeyError) else str(problem)
        raise UpdateRefusedError(
            "an edge's scores cannot be used", where=where, got=got, expected="a finite number of 0 or more for modules of the run",
            do="look at the edge's data; lower learning_rate, or set grad_clip; run the same version of Atoll everywhere",
        ) from None  # fmt: skip
    crosses = bool(counts["crosses"])
    return EdgeScores(
        edge, counts["num_examples"], scores, work, counts["peak_bytes"], (num_bytes(reply.content) if crosses else 0) + up.total(),
        (down_bytes if crosses else 0) + down.total(), WireAccount(up, down), seconds,
    )  # fmt: skip


def _checked(record: MetricRecord, modules: frozenset[str]) -> dict[str, float]:
    if not record:
        raise ValueError("no score at all")
    scores = {}
    for name, score in record.items():
        if name not in modules:
            raise ValueError(f"a score of {name}, which is no module of this run")
        if isinstance(score, list) or not 0 <= score < math.inf:
            raise ValueError(f"{score} for {name}")
        scores[name] = float(score)
    return scores
