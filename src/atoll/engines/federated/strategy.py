"""The coordinator's side of a round, as a Flower Strategy: a message per edge, and the aggregation of what comes back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from atoll.adapters.state import AdapterState
from atoll.cost.meters import FirstStep
from atoll.cost.traffic import WireAccount
from atoll.cost.work import Work
from atoll.engines.federated.aggregation import Aggregator, Common, Contribution, check_update, joined, started
from atoll.engines.federated.flower import ArrayRecord, ConfigRecord, Grid, Message, MessageType, MetricRecord, RecordDict, Strategy
from atoll.engines.federated.parts import Aggregation, EdgeParts, wider
from atoll.engines.federated.payload import BENEATH, get_adapter, num_bytes, put_adapter
from atoll.errors import AdapterFitError, EdgesLostError, UpdateRefusedError


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

    The common adapter is an AdapterState; Flower's `arrays` argument carries the same numbers so that Flower's own loop and logs see them.
    """

    initial: AdapterState
    edge_ranks: Mapping[str, Mapping[str, int]]
    """Per edge: the modules it trains, and their ranks."""
    nodes: Mapping[int, str]
    """Flower's node ids, by edge name."""
    min_edges: int
    observer: Observer
    aggregation: Aggregation = "exact-svd"
    seed: int = 0
    lateness: Callable[[EdgeResult], str | None] = lambda result: None
    """Why an update that came is not counted, where it came too late."""
    rounds_before: int = 0
    """Rounds that were run before Flower counts from 1."""
    common: Common = field(init=False)
    """What the edges share now."""
    _sent: dict[int, tuple[float, int]] = field(default_factory=dict)
    _round_start: float = 0.0

    def __post_init__(self) -> None:
        self.common = started(self.initial, self.aggregation, self.seed)

    @property
    def state(self) -> AdapterState:
        """The common adapter: all that the edges share, in one."""
        return joined(self.common)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message per edge, made when the grid asks for it."""
        number = self.rounds_before + server_round
        self._round_start = time.monotonic()
        self.observer.round_started(number)
        parts, for_all = EdgeParts(self.common.trained, self.aggregation), RecordDict()
        if self.common.beneath is not None:
            put_adapter(for_all, self.common.beneath, BENEATH)
        for node in grid.get_node_ids():
            content = RecordDict({"config": config, **for_all})
            put_adapter(content, parts.of(self.edge_ranks[self.nodes[node]]))
            self._sent[node] = (time.monotonic(), num_bytes(content))
            yield Message(content, node, MessageType.TRAIN, group_id=str(number))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new common adapter. Updates are added up as they come, and none is kept.

        Raises: EdgesLostError where fewer than `min_edges` sent an update that can be used.
        """
        number = self.rounds_before + server_round
        aggregator = Aggregator(self.aggregation, self.common, self._common_ranks(), seed=self.seed, round=number)
        results, silent, reasons = list[EdgeResult](), set(self.nodes), list[str]()
        for reply in replies:
            node = reply.metadata.src_node_id
            silent.discard(node)
            try:
                contribution, result = self._read(node, reply)
                self._check_in_time(result)
                aggregator.add(contribution)
            except (UpdateRefusedError, AdapterFitError) as problem:
                self.observer.edge_dropped(number, self.nodes[node], problem.page())
                reasons.append(f"{self.nodes[node]}: {problem.got.splitlines()[0] if problem.got else problem.what}")
                continue
            results.append(result)
            self.observer.edge_finished(number, result)
        for node in sorted(silent):
            self.observer.edge_dropped(number, self.nodes[node], "no answer before the round ended")
        if len(results) < self.min_edges:
            counted = f"{len(results)} of {len(self.nodes)} edges"
            raise EdgesLostError(
                f"round {number} got too few updates", got="; ".join([counted, *reasons[:3]]),
                expected=f"at least {self.min_edges} ([federated] min_edges)",
                do="see edge_dropped in events.jsonl; the last whole round is in checkpoints/",
            )  # fmt: skip
        outcome = aggregator.finish()
        self.common = outcome.common
        seconds = time.monotonic() - self._round_start
        self.observer.round_finished(RoundResult(number, self.state, outcome.discarded_share, tuple(results), seconds))
        return self.arrays(), None

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

    def replan(self, edge_ranks: Mapping[str, Mapping[str, int]], fresh: AdapterState) -> None:
        """Other modules and ranks from the next round on; modules that were never trained begin as in `fresh`.

        What was trained stays the same function. A bottleneck grows here, since it has no other factors that an edge could be sent.
        """
        self.edge_ranks = edge_ranks
        if not self.rounds_before:
            self.common = started(fresh, self.aggregation, self.seed)
            return
        trained, ranks = self.common.trained, self._common_ranks()
        modules = {name: wider(one, ranks[name]) if trained.kind == "bottleneck" else one for name, one in trained.modules.items()}
        missing = {name: adapter for name, adapter in fresh.modules.items() if name not in modules}
        self.common = replace(self.common, trained=AdapterState(trained.kind, {**modules, **missing}, trained.whole))

    def _read(self, node: int, reply: Message) -> tuple[Contribution, EdgeResult]:
        edge = self.nodes[node]
        if reply.has_error():
            got = reply.error.reason or f"code {reply.error.code}"
            raise UpdateRefusedError("the edge reported an error", where=f"edge {edge}", got=got)
        started, down_bytes = self._sent[node]
        if "metrics" not in reply.content.metric_records:
            raise UpdateRefusedError("the reply carries no figures", where=f"edge {edge}", got=", ".join(reply.content))
        metrics = reply.content.metric_records["metrics"]
        contribution = Contribution(edge, get_adapter(reply.content), int(metrics["num_examples"]))  # type: ignore[arg-type]
        counts = {key: int(metrics[key]) for key in ("num_examples", "num_steps", "num_tokens", "num_label_tokens", "peak_bytes")}  # type: ignore[arg-type]
        up, down = (Counter({k: int(v) for k, v in reply.content.metric_records[key].items()}) for key in ("wire_up", "wire_down"))  # type: ignore[arg-type]
        # Rows that were handed over are trained where the coordinator is: no adapter crosses.
        uploaded = reply.content.metric_records.get("uploaded")
        sent = num_bytes(reply.content) if uploaded is None else int(uploaded["bytes"])  # type: ignore[arg-type]
        down_bytes = down_bytes if uploaded is None else 0
        first = reply.content.metric_records.get("first_step")
        result = EdgeResult(
            edge=edge, mean_loss=float(metrics["mean_loss"]), up_bytes=sent + up.total(),  # type: ignore[arg-type]
            down_bytes=down_bytes + down.total(), wire=WireAccount(up, down), work=Work.from_numbers(metrics),
            seconds=time.monotonic() - started, first_step=None if first is None else FirstStep.from_numbers(first), **counts,
        )  # fmt: skip
        check_update(contribution, self.common.trained, self.edge_ranks[edge])
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
