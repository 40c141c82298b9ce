"""An edge whose plan has it train here in one round and against a host in the next: what it carries over fits both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.adapters.state import AdapterState
from atoll.base.load import load_base
from atoll.config.load import LoadedConfig, load
from atoll.federated.client import client_app
from atoll.federated.flower import Context, Message, MessageType, RecordDict, assume_identity
from atoll.federated.payload import get_adapter, put_adapter
from atoll.federated.receipts import Ask
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.in_process import edge_work
from atoll.jobs.backends.work_orders import SentOrder
from atoll.jobs.backends.worker import Worker
from atoll.jobs.job import prepare
from atoll.jobs.split import HostAccess, serve, start_host
from atoll.planner.edge_plan import EdgePlan
from atoll.runs.events import EventLog
from atoll.split.host.tenants import HostLimits

from tests.run_files import DEMO, Sections, write_run


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedConfig:
    sections: Sections = {
        "run": {"rounds": 3}, "model": {"cut": {"front": 0, "back": 0}}, "data": {"max_length": 48, "train_rows": 24},
        "adapter": {"targets": ["q_proj"], "rank": 2}, "train": {"batch_size": 4, "local_steps": 2, "learning_rate": 2e-3},
    }  # fmt: skip
    return load(write_run(tmp_path, sections, {"north": {"mode": "local"}}, over=DEMO))


@pytest.fixture
def host() -> Iterator[HostAccess]:
    limits = HostLimits()
    running = start_host(serve(load_base("tiny"), "tiny", "fp32", 32, limits), limits, "127.0.0.1:0", None)
    yield HostAccess(f"127.0.0.1:{running.port}")
    running.stop()


def three_rounds(loaded: LoadedConfig, host: HostAccess, plans: list[EdgePlan], start: AdapterState, pool: tuple[str, ...]) -> AdapterState:
    worker, context, state = Worker(loaded, "north", host), Context(1, 1, {"edge": "north"}, RecordDict(), {}), start
    assume_identity(1, 0)
    with EventLog(None) as log:
        for number, plan in enumerate(plans):
            sent = SentOrder(WorkOrder("north", plan, "federated", 6, 0), pool, (), "")
            app, content = client_app(lambda _, sent=sent: edge_work(*worker.work(sent), sent.order, log)), RecordDict()  # type: ignore[misc]
            put_adapter(content, state)
            Ask("", number + 1, "federated", "north").put(content)
            reply = app(Message(content, 1, MessageType.TRAIN, group_id=str(number + 1)), context)
            state = get_adapter(reply.content)
    worker.close()
    return state


def test_an_edge_that_goes_to_a_host_and_back_trains_as_one_that_stays(loaded: LoadedConfig, host: HostAccess) -> None:
    job = prepare(loaded.path)
    here = job.plan.edge("north")
    away = dataclasses.replace(here, mode="split", bits=32, wire_mode="lent")
    stays = three_rounds(loaded, host, [here, here, here], job.start, job.plan.pool)
    moves = three_rounds(loaded, host, [here, away, here], job.start, job.plan.pool)
    for name, adapter in stays.modules.items():
        assert (moves.modules[name].up_OR - adapter.up_OR).abs().max() < 1e-5
        assert (moves.modules[name].down_RI - adapter.down_RI).abs().max() < 1e-5
    assert any(adapter.up_OR.any() for adapter in stays.modules.values())
