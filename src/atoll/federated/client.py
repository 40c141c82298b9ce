"""The edge's side of a round, as a Flower ClientApp: adapter in, local training, update out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from atoll.adapters.state import AdapterState
from atoll.cost.meters import FirstStep, PeakMemory
from atoll.cost.traffic import WireAccount
from atoll.cost.work import Work
from atoll.federated.flower import ClientApp, Context, Message, MetricRecord, RecordDict
from atoll.federated.importance_query import EdgeWarmUp, answer_importance
from atoll.federated.payload import (
    FROZEN_DELTA,
    get_adapter,
    get_optimizer,
    get_statistics,
    precision_of,
    put_adapter,
    put_optimizer,
    put_statistics,
)
from atoll.federated.receipts import put_receipt
from atoll.training.trainer import Batches, FitPlan, ModuleStatistics, OptimizerState, StepReport, Trainer, TrainState


@dataclass(frozen=True, slots=True, eq=False)
class EdgeWork:
    """All that one edge brings to a round; none of it leaves the edge."""

    name: str
    trainer: Trainer
    batches: Batches
    num_examples: int
    plan: FitPlan
    keep_optimizer: bool
    work_of: Callable[[StepReport], Work]
    """What a step cost, by formula."""
    on_step: Callable[[int, StepReport], None]
    """Called with the round and each step's report."""
    account: WireAccount = field(default_factory=WireAccount)
    """What crosses between this edge and its host; stays empty for an edge that has the whole base."""
    uploaded_bytes: int | None = None
    """Of the edge's rows, where they were uploaded and this work is done at the coordinator; None: it is done on the edge."""
    warm_up: EdgeWarmUp | None = None
    """How the edge scores modules when it is asked to; None: it cannot."""
    transform: Callable[[AdapterState, AdapterState, int], AdapterState] = lambda update, sent, round_number: update
    """What is done to an update before it leaves: given it, what the edge was sent, and the round."""
    base_digest: str = ""
    """SHA-256 of the edge's base (Base.digest), for a coordinator that compares; empty: not looked at."""


def client_app(edge_of: Callable[[Context], EdgeWork]) -> ClientApp:
    """A Flower app that trains, and scores modules; `edge_of` finds this node's model and data from its context."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _train(edge_of(context), message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        work = edge_of(context)
        crosses = work.uploaded_bytes is None
        return answer_importance(work.name, work.warm_up, work.num_examples, work.account, message, crosses=crosses)

    return app


def _fitting(optimizer: OptimizerState, adapter: AdapterState) -> OptimizerState:
    """Without the moments of modules that have another rank since: a new plan may change it."""
    sizes = {name: part.num_parameters for name, part in adapter.parts.items()}
    return {name: moments for name, moments in optimizer.items() if sizes.get(name, moments.first.numel()) == moments.first.numel()}


def _train(work: EdgeWork, message: Message, context: Context) -> Message:
    round_number, reply = int(message.metadata.group_id), RecordDict()
    put_receipt(reply, message.content, work.name, work.base_digest)
    # An edge's step count and Adam moments stay in its own Flower context: they are private, and live on from round to round.
    progress = context.state.metric_records.get("progress", MetricRecord({"step": 0}))
    sent = adapter = get_adapter(message.content)
    optimizer = _fitting(get_optimizer(context.state), adapter) if work.keep_optimizer else {}
    frozen_delta = get_adapter(message.content, FROZEN_DELTA) if FROZEN_DELTA in message.content else None
    statistics = get_statistics(context.state)
    if not statistics.fits(adapter):
        statistics = ModuleStatistics()
    state = TrainState(adapter, optimizer, int(progress["step"]), statistics, frozen_delta)  # type: ignore[arg-type]
    before = work.account.copy()
    with PeakMemory() as peak:
        update = work.trainer.fit(state, work.batches, work.plan, lambda report: work.on_step(round_number, report))
    context.state["progress"] = MetricRecord({"step": update.state.step})
    put_statistics(context.state, update.state.statistics)
    if work.keep_optimizer:
        put_optimizer(context.state, update.state.optimizer)
    adapter, trained = update.state.adapter, update.trained
    # A module that was not trained is no vote for leaving it as it was: the edges that trained it decide.
    modules = {name: value for name, value in adapter.modules.items() if name in trained}
    full_weights = {name: value for name, value in adapter.full_weights.items() if name in trained}
    leaving = work.transform(AdapterState(adapter.kind, modules, full_weights), sent, round_number)
    put_adapter(reply, leaving, precision=precision_of(message.content))
    reply["metrics"] = MetricRecord({
        "num_examples": work.num_examples,
        "num_steps": len(update.reports),
        "num_tokens": sum(report.num_tokens for report in update.reports),
        "num_label_tokens": sum(report.num_label_tokens for report in update.reports),
        "mean_loss": update.mean_loss,
        "peak_bytes": peak.num_bytes,
        **sum((work.work_of(report) for report in update.reports), Work()).to_numbers(),
    })  # fmt: skip
    if work.uploaded_bytes is not None:
        reply["uploaded"] = MetricRecord({"bytes": work.uploaded_bytes if state.step == 0 else 0})
    else:  # Otherwise what was counted was not done on the edge.
        for report in update.reports:
            if report.counted is not None:
                reply["first_step"] = MetricRecord(dict(FirstStep(report.counted, work.work_of(report).flops).to_numbers()))
    crossed = work.account.since(before)
    reply["wire_up"], reply["wire_down"] = MetricRecord(dict(crossed.sent)), MetricRecord(dict(crossed.received))
    return Message(reply, reply_to=message)
