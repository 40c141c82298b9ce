"""The edge's side of a round, as a Flower ClientApp: adapter in, local training, update out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from atoll.cost.formulas import Flops
from atoll.cost.meters import PeakMemory
from atoll.cost.traffic import WireAccount, WireBytes
from atoll.engines.federated.flower import ClientApp, Context, Message, MetricRecord, RecordDict
from atoll.engines.federated.payload import get_adapter, get_optimizer, put_adapter, put_optimizer
from atoll.engines.trainer import Batches, FitPlan, StepReport, Trainer, TrainState


@dataclass(frozen=True, slots=True, eq=False)
class EdgeWork:
    """All that one edge brings to a round; none of it leaves the edge."""

    name: str
    trainer: Trainer
    batches: Batches
    num_examples: int
    plan: FitPlan
    keep_optimizer: bool
    flops_of: Callable[[StepReport], Flops]
    """What a step cost, by formula."""
    on_step: Callable[[int, StepReport], None]
    """Called with the round and each step's report."""
    account: WireAccount = field(default_factory=WireAccount)
    """What crosses between this edge and its host; stays empty for an edge that has the whole base."""
    wire_bytes_of: Callable[[StepReport], WireBytes] = lambda report: WireBytes()
    """The same for one step, by formula."""


def client_app(work_of: Callable[[Context], EdgeWork]) -> ClientApp:
    """A Flower app that trains; `work_of` finds this node's model and data from its context."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _train(work_of(context), message, context)

    return app


def _train(work: EdgeWork, message: Message, context: Context) -> Message:
    round_number = int(message.metadata.group_id)
    # An edge's step count and Adam moments stay in its own Flower context: they are private, and live on from round to round.
    progress = context.state.metric_records.get("progress", MetricRecord({"step": 0}))
    optimizer = get_optimizer(context.state) if work.keep_optimizer else None
    state = TrainState(get_adapter(message.content), optimizer, int(progress["step"]))  # type: ignore[arg-type]
    before = work.account.copy()
    with PeakMemory() as peak:
        update = work.trainer.fit(state, work.batches, work.plan, lambda report: work.on_step(round_number, report))
    context.state["progress"] = MetricRecord({"step": update.state.step})
    if update.state.optimizer is not None and work.keep_optimizer:
        put_optimizer(context.state, update.state.optimizer)
    flops = sum((work.flops_of(report) for report in update.reports), Flops(0, 0, 0))
    formula = sum((work.wire_bytes_of(report) for report in update.reports), WireBytes())
    reply = RecordDict()
    put_adapter(reply, update.state.adapter)
    reply["metrics"] = MetricRecord({
        "num_examples": work.num_examples,
        "num_steps": len(update.reports),
        "num_tokens": sum(report.num_tokens for report in update.reports),
        "num_label_tokens": sum(report.num_label_tokens for report in update.reports),
        "mean_loss": update.mean_loss,
        "peak_bytes": peak.num_bytes,
        "block_flops": flops.block_flops,
        "adapter_flops": flops.adapter_flops,
        "head_flops": flops.head_flops,
        "formula_up_bytes": formula.up_bytes,
        "formula_down_bytes": formula.down_bytes,
        "formula_unshared_bytes": formula.unshared_bytes,
    })  # fmt: skip
    crossed = work.account.since(before)
    reply["wire_up"], reply["wire_down"] = MetricRecord(dict(crossed.sent)), MetricRecord(dict(crossed.received))
    return Message(reply, reply_to=message)
