"""An edge's own copy of what the federation came to, trained further on the edge's rows alone. Nothing of it is averaged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from atoll.adapters.state import AdapterState
from atoll.cost.traffic import WireAccount
from atoll.cost.work import Work
from atoll.federated.aggregation.aggregate import Common, joined
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.in_process import edge_work
from atoll.jobs.job import Job, Participant
from atoll.runs.events import EventLog
from atoll.training.trainer import TrainState

PHASE: Final = "personal"


@dataclass(frozen=True, slots=True, eq=False)
class PersonalCopy:
    """What came of it, and what it cost."""

    edge: str
    state: AdapterState
    work: Work
    wire: WireAccount
    """What crossed between the edge and its host, if it has one."""

    @property
    def up_bytes(self) -> int:
        """To the host."""
        return sum(self.wire.sent.values())

    @property
    def down_bytes(self) -> int:
        """From the host."""
        return sum(self.wire.received.values())


def personal_order(job: Job, edge: Participant) -> WorkOrder:
    """What an edge is to do after the last round: its plan, with the steps of [federated] personal_steps and a schedule over them."""
    steps = job.config.federated.personal_steps
    assert steps is not None
    return WorkOrder(edge.name, replace(edge.plan, num_steps=steps), PHASE, steps, job.config.run.rounds)


def personal_copy(job: Job, edge: Participant, order: WorkOrder, given: Common, log: EventLog) -> PersonalCopy:
    """Train from what the edge would be sent in another round, with a new optimizer, and from its first batch on."""
    work = edge_work(job, edge, order, log)
    before = work.account.copy()
    # Blocks in a host have no frozen delta: there the copy is of what the edge trains alone.
    frozen = given.frozen_delta if order.plan.mode != "split" else None
    start = TrainState(given.trained, {}, 0, frozen_delta=frozen)
    update = work.trainer.fit(start, work.batches, work.plan, partial(work.on_step, 1))
    state = joined(Common(update.state.adapter, frozen))
    done = sum((work.work_of(report) for report in update.reports), Work())
    return PersonalCopy(edge.name, state, done, work.account.since(before))
