"""policy.toml: written with an edge's folder, read when the edge joins, and told where an order goes beyond it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from atoll.config.load import load
from atoll.errors import ManyErrors, UnknownKeyError
from atoll.federated.flower import ConfigRecord, RecordDict
from atoll.federated.payload import WORK_ORDER, put_adapter
from atoll.federated.receipts import Ask
from atoll.fleet.files import EdgeFolder
from atoll.fleet.init import init
from atoll.fleet.join import answer_once, join, opened
from atoll.fleet.links.frames import Frame
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.edge_policy import EdgePolicy, policy_of, read_policy
from atoll.jobs.backends.fleet import TEXT
from atoll.jobs.backends.work_orders import to_text
from atoll.jobs.job import prepared
from atoll.runs.events import EventLog, read_events

RUN = """
[model]
base = "tiny"

[data]
train = "demo"
train_rows = 10
prompt = "{mr} ->"
completion = " {ref}"

[adapter]
rank = 2

[train]
local_steps = 1

[federated]
round_timeout = "10 min"

[[edge]]
name = "north"

[[edge]]
name = "south"
rank = 4
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN)
    init(tmp_path / "run.toml", tmp_path / "fleet", "127.0.0.1:7440")
    return tmp_path / "fleet"


def test_every_edge_gets_the_limits_of_its_own_section(fleet: Path) -> None:
    config = load(fleet / "coordinator" / "run.toml").config
    for edge, rank in zip(config.edge, (2, 4), strict=True):
        policy = read_policy(fleet / "edges" / edge.name / "policy.toml")
        assert policy == policy_of(config, edge).model_copy(update={"seconds": 600.0})
        assert (policy.rank, policy.steps, policy.tasks) == (rank, 1, ("federated",))
    assert not list((fleet / "coordinator").glob("policy.toml"))


def test_an_edge_is_held_to_what_its_folder_says(fleet: Path) -> None:
    north = fleet / "edges" / "north"
    (north / "policy.toml").write_text("[edge-policy]\nbytes = '1 KB'\n")
    with EventLog(None) as log:
        assert opened(EdgeFolder(north), None, (), log)._worker.policy == EdgePolicy(bytes=1000)
    (north / "policy.toml").unlink()
    with EventLog(None) as log:
        assert opened(EdgeFolder(north), None, (), log)._worker.policy == EdgePolicy()


def test_an_order_beyond_it_is_told_at_the_edge_and_in_the_answer(fleet: Path) -> None:
    north = fleet / "edges" / "north"
    (north / "policy.toml").write_text("[edge-policy]\nrank = 1\n")
    job = prepared(load(north / "run.toml"))
    content = RecordDict()
    put_adapter(content, job.start)
    Ask("run1", 1, "federated", "north").put(content)
    order = WorkOrder("north", job.edges[0].plan, "federated", 3, 0)
    content[WORK_ORDER] = ConfigRecord({TEXT: to_text(order, job.plan.pool, (), "run1")})
    job.close()
    answer = Frame.from_bytes(answer_once(north, Frame(1, 7, "train", "1", content).to_bytes()))
    assert answer.problem is not None
    assert "1 to 1 (policy.toml)" in answer.problem
    assert [event["advice"] for event in read_events(north / "events.jsonl")] == [answer.problem]


def test_a_wrong_policy_is_a_page_before_anything_starts(fleet: Path) -> None:
    north = fleet / "edges" / "north"
    (north / "policy.toml").write_text("[edge-policy]\nstep = 5\nrank = 'two'\n")
    with pytest.raises(ManyErrors) as caught:
        join(north, print, stop=threading.Event())
    assert [error.code for error in caught.value.errors] == ["C103", "C102"]
    assert isinstance(caught.value.errors[1], UnknownKeyError)
    assert "policy.toml, line 2" in caught.value.errors[1].where
    assert not (north / "state").exists()
