"""The coordinator's side of a round, as a Flower Strategy: a message per edge, and the aggregation of what comes back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from atoll.adapters.state import AdapterState
from atoll.cost.meters import FirstStep
from atoll.cost.traffic import WireAccount
from atoll.cost.work import Work
from atoll.errors import AdapterFitError, AtollError, EdgesLostError, UpdateRefusedError
from atoll.federated.aggregation.aggregate import Aggregate, Common, aggregate, is_too_large, joined, started
from atoll.federated.aggregation.edge_parts import EdgeParts, Precision, wider
from atoll.federated.aggregation.robust import MEAN, Clipped, Robust, outlier
from atoll.federated.aggregation.spool import Contribution, Spool
from atoll.federated.checks import check_contents, check_examples, check_update
from atoll.federated.figures import counter, finite_number, first_step_of, reading, whole_number, work_of
from atoll.federated.flower import ArrayRecord, ConfigRecord, Grid, Message, MessageType, MetricRecord, RecordDict, Strategy
from atoll.federated.grid import EDGE_LEFT
from atoll.federated.payload import ADAPTER, FROZEN_DELTA, WORK_ORDER, array_bytes, get_adapter, num_bytes, put_adapter
from atoll.federated.receipts import Ask
from atoll.units import counted

_RECORDS = frozenset({"receipt", ADAPTER, f"{ADAPTER}_config", "metrics", "uploaded", "first_step", "wire_up", "wire_down"})
"""What an answer may hold."""
_COUNTS = ("num_examples", "num_steps", "num_tokens", "num_label_tokens", "peak_bytes")


@dataclass(frozen=True, slots=True)
class EdgeResult:
    """What one edge reported of one round."""

    edge: str
    num_examples: int
    num_steps: int
    num_tokens: int
    num_label_tokens: int
    mean_loss: float
    peak_bytes: int
    work: Work
    """By formula."""
    up_bytes: int
    """Of the update, and of the exchanges with a host where there is one."""
    down_bytes: int
    wire: WireAccount
    """Of these, the exchanges with a host, by message kind."""
    seconds: float
    first_step: FirstStep | None = None
    """In the round of the edge's first step, and where it was done on the edge."""


@dataclass(frozen=True, slots=True, eq=False)
class RoundResult:
    """What came out of one round."""

    round: int
    state: AdapterState
    """The common adapter: all that the edges share, in one."""
    discarded_share: float
    edges: tuple[EdgeResult, ...]
    seconds: float
    clipped: tuple[Clipped, ...] = ()


@dataclass(frozen=True, slots=True)
class Observer:
    """What the coordinator tells while it works."""

    round_started: Callable[[int], None]
    edge_finished: Callable[[int, EdgeResult], None]
    edge_dropped: Callable[[int, str, str], None]
    round_finished: Callable[[RoundResult], None]


@dataclass(eq=False)
class AdapterStrategy(Strategy):
    """Sends every edge the common adapter at the edge's own ranks, and makes one of what returns, by a rule of `aggregation`.

    An answer that must not count is refused, its edge dropped from the round by name, and the round goes on. An edge that answers the same
    question twice does not count at all: otherwise the order of arrival would decide.

    The common adapter is an AdapterState; Flower's `arrays` argument carries the same numbers so that Flower's own loop and logs see them.
    """

    initial: AdapterState
    edge_ranks: Mapping[str, Mapping[str, int]]
    """Per edge: the modules it trains, and their ranks."""
    nodes: Mapping[int, str]
    """Flower's node ids, by edge name."""
    min_edges: int
    observer: Observer
    aggregation: str = "exact-svd"
    """The name of a rule."""
    options: Mapping[str, object] | None = None
    """The rule's own."""
    precision: Precision = "fp32"
    """In which adapters travel."""
    robust: Robust = MEAN
    """How far one update may move the mean."""
    max_norm: float | None = None
    """Updates with a module whose product, or change, has a larger norm are refused."""
    run_id: str = ""
    phase: str = "federated"
    votes: Mapping[str, float] = field(default_factory=dict)
    """How often an edge's examples count, as planned and not as it says; of edges that are not named, once."""
    base_digests: Mapping[str, str] = field(default_factory=dict)
    """Of the bases that edges must have; that of an edge which is absent is not looked at."""
    seed: int = 0
    patience: int = 3
    """Rounds in a row that an edge may miss; then no round waits for it until it answers one in time."""
    lateness: Callable[[EdgeResult], str | None] = lambda result: None
    """Why an update that came is not counted, where it came too late."""
    work_order_of: Callable[[int], ConfigRecord | None] = lambda node: None
    """What a message must tell the edge of a node beside the adapter; None: nothing."""
    rounds_before: int = 0
    """Rounds that were run before Flower counts from 1."""
    common: Common = field(init=False)
    """What the edges share now."""
    _parts: EdgeParts = field(init=False)
    """Of the common adapter, as the round began with it."""
    _missed: Counter[int] = field(default_factory=Counter)
    """Rounds in a row without an answer, by node."""
    _sent: dict[int, tuple[float, int]] = field(default_factory=dict)
    """When each node was asked in this round, and with how many bytes."""
    _refused: list[str] = field(default_factory=list)
    """Whose answers of this round do not count, and why."""
    _declared: dict[str, int] = field(default_factory=dict)
    """Number of examples in every edge's first answer."""
    _round_start: float = 0.0

    def __post_init__(self) -> None:
        self.common = started(self.initial, self.aggregation, self.seed)
        self._parts = EdgeParts(self.common.trained, self.aggregation, self.precision)

    @property
    def state(self) -> AdapterState:
        """The common adapter: all that the edges share, in one."""
        return joined(self.common)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message per edge of the run that the grid reaches, made when the grid asks for it."""
        number = self.rounds_before + server_round
        self._round_start = time.monotonic()
        self.observer.round_started(number)
        self._parts, for_all = EdgeParts(self.common.trained, self.aggregation, self.precision), RecordDict()
        self._sent.clear()
        self._refused.clear()
        if self.common.frozen_delta is not None:
            put_adapter(for_all, self.common.frozen_delta, FROZEN_DELTA, self.precision)
        for node in (node for node in grid.get_node_ids() if node in self.nodes):
            content = RecordDict({"config": config, **for_all})
            put_adapter(content, self._given(self.nodes[node]), precision=self.precision)
            self._ask(number, node).put(content)
            if (order := self.work_order_of(node)) is not None:
                content[WORK_ORDER] = order
            self._sent[node] = (time.monotonic(), num_bytes(content))
            yield Message(content, node, MessageType.TRAIN, group_id=str(number))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new common adapter, the same bits in whatever order the updates come; memory holds one of them at a time.

        Raises: EdgesLostError where fewer than `min_edges` sent an update that can be used.
        """
        number = self.rounds_before + server_round
        with Spool() as spool:
            results = self._collect(number, replies, spool)
            outcome = self._aggregated(number, spool, results)
        self.common = outcome.common
        seconds = time.monotonic() - self._round_start
        edges = tuple(results[edge] for edge in self.nodes.values() if edge in results)
        self.observer.round_finished(RoundResult(number, self.state, outcome.discarded_share, edges, seconds, tuple(outcome.clipped)))
        return self.arrays(), None

    def _collect(self, number: int, replies: Iterable[Message], spool: Spool) -> dict[str, EdgeResult]:
        """Put the updates that count into the spool; what their edges reported."""
        results, heard, answered = dict[str, EdgeResult](), set[int](), set[int]()
        for reply in self._awaited(replies):
            node = reply.metadata.src_node_id
            edge = self.nodes.get(node, f"node {node}")
            heard.add(node)
            try:
                with reading(edge):
                    self._check_sent(node)
                if reply.has_error() and reply.error.code == EDGE_LEFT:
                    self.observer.edge_dropped(number, edge, reply.error.reason or "it left")
                    continue
                with reading(edge):
                    self._check_asked(number, node, reply)
                if node in answered:
                    results.pop(edge, None)
                    spool.drop(edge)
                    raise UpdateRefusedError(
                        "a second answer in one round", where=f"edge {edge}", got="two answers to one question", expected="one",
                        do="see that no two processes take part as the same edge",
                    )  # fmt: skip
                answered.add(node)
                with reading(edge):
                    contribution, result = self._read(node, reply)
                self._check_in_time(result)
            except (UpdateRefusedError, AdapterFitError) as problem:
                self._refuse(number, edge, problem)
                continue
            spool.put(contribution)
            self._declared.setdefault(edge, result.num_examples)
            results[edge] = result
            self.observer.edge_finished(number, result)
        for node in sorted(self.nodes.keys() - heard):
            self._missed[node] += 1
            self.observer.edge_dropped(number, self.nodes[node], "no answer before the round ended")
        for node in heard:
            self._missed.pop(node, None)
        self._check_enough(number, results)
        return results

    def _refuse(self, number: int, edge: str, problem: AtollError) -> None:
        problem.where = problem.where or f"edge {edge}"
        self.observer.edge_dropped(number, edge, problem.page())
        self._refused.append(f"{edge}: {problem.got.splitlines()[0] if problem.got else problem.what}")

    def _check_enough(self, number: int, results: Mapping[str, EdgeResult]) -> None:
        if len(results) < self.min_edges:
            came = f"{len(results)} of {counted(len(self.nodes), 'edge')}"
            raise EdgesLostError(
                f"round {number} got too few updates", got="; ".join([came, *self._refused[:3]]),
                expected=f"at least {self.min_edges} ([federated] min_edges)",
                do="see edge_dropped in events.jsonl" + ("; the last whole round is in checkpoints/" if number > 1 else ""),
            )  # fmt: skip

    def _aggregated(self, number: int, spool: Spool, results: dict[str, EdgeResult]) -> Aggregate:
        """What the updates come to; without one that stands out, where with it they come to numbers that nobody could go on from.

        Raises: UpdateRefusedError where they do, and none stands out; EdgesLostError where too few are left.
        """
        while True:
            try:
                outcome = aggregate(
                    spool, self.aggregation, self.common, self._common_ranks(), self._given, robust=self.robust, options=self.options,
                    seed=self.seed, round=number,
                )  # fmt: skip
                problem = None
            except UpdateRefusedError as not_finite:
                problem = not_finite
            edge = outlier(spool) if problem or is_too_large(outcome.common, self.max_norm) else None
            if edge is None and problem is not None:
                raise problem
            if edge is None:
                return outcome
            spool.drop(edge)
            del results[edge]
            self._refuse(number, edge, UpdateRefusedError(
                "with this update the round comes to numbers that no edge can go on from", got="an update far larger than the others",
                expected="updates of like size", do="leave the edge out if it cannot be trusted; or lower learning_rate",
            ))  # fmt: skip
            self._check_enough(number, results)

    def _awaited(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies until all edges have answered that are waited for: those that did not miss too many rounds in a row."""
        gone = {node for node, missed in self._missed.items() if missed >= self.patience}
        left = set(self.nodes) - gone
        for reply in replies:
            yield reply
            left.discard(reply.metadata.src_node_id)
            if gone and not left:
                return

    def given(self) -> dict[str, Common]:
        """What each edge would train in another round; under it, frozen, what the edges share beside that."""
        parts, common = EdgeParts(self.common.trained, self.aggregation, self.precision), self.common
        found: dict[str, Common] = {}
        for edge, ranks in self.edge_ranks.items():
            others = {name: one for name, one in common.trained.modules.items() if name not in ranks}
            rest = AdapterState(common.trained.kind, others) if others else None
            frozen = common.frozen_delta if rest is None else rest if common.frozen_delta is None else rest + common.frozen_delta
            found[edge] = Common(parts.of(ranks), frozen)
        return found

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """No messages: held-out rows are the coordinator's, and are scored once, after the last round."""
        return ()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing: see `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Nothing to log: plan.json and events.jsonl say more."""

    def arrays(self) -> ArrayRecord:
        """What the edges train, as a Flower record."""
        record = RecordDict()
        put_adapter(record, self.common.trained)
        return record.array_records["adapter"]

    def take_part(self, nodes: Mapping[int, str], edge_ranks: Mapping[str, Mapping[str, int]], votes: Mapping[str, float]) -> None:
        """Other edges from the round on that begins."""
        self.nodes, self.edge_ranks, self.votes = dict(nodes), edge_ranks, votes

    def replan(self, edge_ranks: Mapping[str, Mapping[str, int]], votes: Mapping[str, float], fresh: AdapterState) -> None:
        """Other modules and ranks from the next round on; modules that were never trained begin as in `fresh`.

        What was trained stays the same function. A bottleneck grows here, since it has no other factors that an edge could be sent.
        """
        self.edge_ranks, self.votes = edge_ranks, votes
        if not self.rounds_before:
            self.common = started(fresh, self.aggregation, self.seed)
            return
        trained, ranks = self.common.trained, self._common_ranks()
        modules = {name: wider(one, ranks[name]) if trained.kind == "bottleneck" else one for name, one in trained.modules.items()}
        missing = {name: adapter for name, adapter in fresh.modules.items() if name not in modules}
        self.common = replace(self.common, trained=AdapterState(trained.kind, {**modules, **missing}, trained.full_weights))

    def _given(self, edge: str) -> AdapterState:
        """What this edge was sent in this round."""
        return self._parts.of(self.edge_ranks[edge])

    def _ask(self, number: int, node: int) -> Ask:
        return Ask(self.run_id, number, self.phase, self.nodes[node])

    def _check_sent(self, node: int) -> None:
        if node not in self._sent:
            raise UpdateRefusedError(
                "an answer of a node that was not asked", where=self.nodes.get(node, f"node {node}"), got=f"node {node}",
                expected=f"one of the {len(self._sent)} nodes that were sent this round's adapter", do="find out who sends it",
            )  # fmt: skip

    def _check_asked(self, number: int, node: int, reply: Message) -> None:
        if reply.has_error():
            got = reply.error.reason or f"code {reply.error.code}"
            raise UpdateRefusedError("the edge reported an error", where=f"edge {self.nodes[node]}", got=got)
        self._ask(number, node).check(reply.content, self.base_digests.get(self.nodes[node]))

    def _read(self, node: int, reply: Message) -> tuple[Contribution, EdgeResult]:
        edge, content, given = self.nodes[node], reply.content, self._given(self.nodes[node])
        check_contents(edge, content, _RECORDS, {ADAPTER: array_bytes(given)}, len(given.parts))
        started, down_bytes = self._sent[node]
        numbers = content.metric_records
        metrics, first = numbers["metrics"], numbers.get("first_step")
        up, down = (counter(numbers[key]) for key in ("wire_up", "wire_down"))
        # Rows that were handed over are trained where the coordinator is: no adapter crosses.
        crosses = "uploaded" not in numbers
        sent = num_bytes(content) if crosses else whole_number(numbers["uploaded"], "bytes")
        result = EdgeResult(
            edge=edge, mean_loss=finite_number(metrics, "mean_loss"), up_bytes=sent + up.total(),
            down_bytes=(down_bytes if crosses else 0) + down.total(), wire=WireAccount(up, down), work=work_of(metrics),
            seconds=time.monotonic() - started, first_step=None if first is None else first_step_of(first),
            **{key: whole_number(metrics, key) for key in _COUNTS},
        )  # fmt: skip
        contribution = Contribution(edge, get_adapter(content), result.num_examples * self.votes.get(edge, 1))
        check_examples(edge, result.num_examples, self._declared.get(edge))
        check_update(contribution, given, self.max_norm)
        return contribution, result

    def _check_in_time(self, result: EdgeResult) -> None:
        reason = self.lateness(result)
        if reason is not None:
            raise UpdateRefusedError(
                "an update came too late", where=f"edge {result.edge}", got=reason, expected="an edge that is done by the deadline",
                do='raise plan.round_deadline, write late = "cut" or "wait" below [federated], or let plan.policy = "fedpipe" plan for it',
            )  # fmt: skip

    def _common_ranks(self) -> dict[str, int]:
        """The largest rank that any edge has; of modules that none has, what it is."""
        ranks: dict[str, int] = {}
        for modules in self.edge_ranks.values():
            for name, rank in modules.items():
                ranks[name] = max(ranks.get(name, 0), rank)
        return self.common.trained.ranks | ranks
