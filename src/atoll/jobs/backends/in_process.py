"""Edges in this process: one after the other, on the bases that the job has loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from atoll.adapters.state import AdapterState
from atoll.cost.traffic import WireAccount
from atoll.federated.aggregation.edge_parts import Precision
from atoll.federated.aggregation.robust import MEAN, Robust
from atoll.federated.client import EdgeWork, client_app
from atoll.federated.flower import ConfigRecord
from atoll.federated.grid import InProcessGrid
from atoll.federated.importance_query import EdgeWarmUp
from atoll.federated.store import EdgeStates
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.job import Job, Participant
from atoll.jobs.step_cost import step_work
from atoll.privacy.transform import UpdateContext, transformed
from atoll.registry.parts import trait
from atoll.runs.events import Advised, EventLog, HostLost, ModulesChosen, Phase, StepDone
from atoll.training.importance_warmup import ModuleScores, WarmUp, warm_up
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, StepReport


class InProcessBackend:
    """A backend in this process. Its edges' own states lie in `folder`, or in one for temporary files, until it is closed."""

    def __init__(self, job: Job, edges: Sequence[Participant], phase: Phase, log: EventLog, folder: Path | None = None) -> None:
        self._log = log
        self._works: dict[str, EdgeWork] = {}
        self._nodes = {number + 1: edge.name for number, edge in enumerate(edges)}
        self._states = EdgeStates(self._nodes, folder)
        self._grid = InProcessGrid(client_app(lambda context: self._works[str(context.node_config["edge"])]), self._states)

    @property
    def nodes(self) -> Mapping[int, str]:
        """The edges' names by node."""
        return self._nodes

    @property
    def base_digests(self) -> Mapping[str, str]:
        """None: the bases are this process's own."""
        return {}

    @property
    def grid(self) -> InProcessGrid:
        """What hands messages to them."""
        return self._grid

    def changed(self, job: Job, number: int) -> Job | None:
        """None: all edges are here from the start."""
        return None

    def give(self, job: Job, edges: Sequence[Participant], orders: Sequence[WorkOrder]) -> None:
        """Make each edge's work by its work order."""
        for edge, order in zip(edges, orders, strict=True):
            self._works[edge.name] = edge_work(job, edge, order, self._log)

    def work_order_record(self, node: int) -> ConfigRecord | None:
        """None: the work is here."""
        return None

    def save(self, folder: Path) -> None:
        """Link the states into a new folder."""
        self._states.save(folder)

    def restore(self, folder: Path) -> None:
        """Go on from states that were saved."""
        self._states.restore(folder)

    def close(self) -> None:
        """Delete the edges' own states."""
        self._states.close()


def edge_work(job: Job, edge: Participant, order: WorkOrder, log: EventLog, base_digest: str = "") -> EdgeWork:
    """One edge's trainer, data and plan; `base_digest` is shown with every update."""
    assert edge.batches is not None, "an edge's work is made where its rows are"
    assert edge.examples is not None
    config, plan, phase = job.config, order.plan, order.phase

    def on_step(round_number: int, report: StepReport) -> None:
        if report.active_change is not None:
            change, policy, active = report.active_change, config.select.policy, report.active
            log.append(ModulesChosen(
                phase, round_number, edge.name, report.step, change.reason, policy, active, change.killed, change.revived, change.scores
            ))  # fmt: skip
        log.append(_step_done(phase, round_number, edge.name, report))

    epoch_batches = None if config.train.local_epochs is None else edge.batches.batches_per_epoch
    trainer = LocalTrainer(
        job.base_of(plan), config.train, total_steps=order.total_steps, dropout=config.adapter.dropout, seed=config.run.seed,
        edge=edge.name, selector=edge.selector if edge.selector.schedule.ever else None,
    )  # fmt: skip
    account = WireAccount()
    if plan.mode == "split":
        assert job.split is not None
        client = job.split.client
        client.on_lost = lambda reason: log.append(HostLost(edge.name, reason))
        client.on_held = lambda reason: log.append(Advised(edge.name, reason))
        trainer, account = replace(trainer, attempt=partial(client.retrying_in, plan.wire_mode)), client.account
    return EdgeWork(
        name=edge.name,
        trainer=trainer,
        account=account,
        batches=edge.batches,
        num_examples=len(edge.examples),
        plan=FitPlan(plan.num_steps, plan.accumulate, plan.gradient_checkpointing, epoch_batches),
        # Where adapters start anew in every round, there is nothing that old moments belong to.
        keep_optimizer=config.train.optimizer_state == "keep" and not trait("aggregation", aggregation_of(job, phase), "starts_anew"),
        work_of=lambda report: step_work(job, plan, report),
        uploaded_bytes=edge.uploaded_bytes if plan.mode == "cloud" else None,
        on_step=on_step,
        warm_up=_Importance(job, edge, log, order.rounds_before).as_work(),
        transform=_transform_of(job, edge, phase),
        base_digest=base_digest,
    )


def _transform_of(job: Job, edge: Participant, phase: Phase) -> Callable[[AdapterState, AdapterState, int], AdapterState]:
    """[privacy] transforms; the comparison rows are plain training, which nothing leaves."""
    config, num_examples = job.config, len(edge.examples or ())
    names = config.privacy.transforms if phase == "federated" else ()

    def transform(update: AdapterState, sent: AdapterState, round_number: int) -> AdapterState:
        context = UpdateContext(sent, edge.name, round_number, num_examples, config.run.seed)
        return transformed(update, names, config.options, context)

    return transform


@dataclass(frozen=True, slots=True, eq=False)
class _Importance:
    """How one edge scores modules."""

    job: Job
    edge: Participant
    log: EventLog
    round_number: int

    def as_work(self) -> EdgeWarmUp | None:
        """None where nothing is to be scored, or this edge cannot."""
        if self.edge.warm_up is None:
            return None
        plan = replace(
            self.edge.plan, ranks=dict.fromkeys(self.job.plan.pool, self.job.config.plan.warmup_rank),
            gradient_checkpointing=self.edge.warm_up.gradient_checkpointing,
        )  # fmt: skip
        return EdgeWarmUp(self.scores, lambda report: step_work(self.job, plan, report))

    def scores(self, adapter: AdapterState | None) -> ModuleScores:
        """Of every module, on the edge's own data."""
        config, plan, job = self.job.config, self.edge.plan, self.job
        assert config.plan.importance != "none"
        assert self.edge.warm_up is not None
        assert self.edge.warm_up.batches is not None
        settings = WarmUp(
            config.plan.importance, config.plan.warmup_steps, config.plan.warmup_rank, config.adapter.alpha, config.train,
            config.run.seed, self.edge.name, self.round_number, self.edge.warm_up.gradient_checkpointing,
            config.options_of(config.plan.importance),
        )  # fmt: skip
        if plan.mode == "split":
            assert job.split is not None
            settings = replace(settings, attempt=partial(job.split.client.retrying_in, plan.wire_mode))
        sizes = {module.name: (module.d_in, module.d_out) for module in job.shapes.modules if module.name in job.plan.pool}
        module_scores = warm_up(job.base_of(plan), sizes, self.edge.warm_up.batches, settings, adapter)
        for report in module_scores.reports:
            self.log.append(_step_done("warm-up", self.round_number, self.edge.name, report))
        return module_scores


def _step_done(phase: Phase, round_number: int, edge: str, report: StepReport) -> StepDone:
    return StepDone(
        phase, round_number, edge, report.step, report.loss, report.learning_rate, report.grad_norm, report.num_tokens,
        report.num_label_tokens, len(report.active),
    )  # fmt: skip


def aggregation_of(job: Job, phase: Phase) -> str:
    """By which rule updates become one. The comparison rows are plain training of one adapter, whatever the rule of the federation."""
    return job.config.federated.aggregation if phase == "federated" else "exact-svd"


def precision_of(job: Job, phase: Phase) -> Precision:
    """In which adapters travel: of the federation alone, as `aggregation_of`."""
    return job.config.federated.precision if phase == "federated" else "fp32"


def robust_of(job: Job, phase: Phase) -> Robust:
    """How far one update may move the mean: of the federation alone, as `aggregation_of`."""
    federated = job.config.federated
    return Robust(federated.combine, federated.trim, federated.clip_update) if phase == "federated" else MEAN
