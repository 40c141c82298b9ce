"""An edge's own copy on its own machine: the same as in one process, kept there, and trained once however often it is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atoll.adapters.peft_files import load_adapter
from atoll.config.load import load
from atoll.federated.aggregation.aggregate import Common
from atoll.federated.flower import ArrayRecord, ConfigRecord, RecordDict
from atoll.federated.payload import WORK_ORDER, put_adapter
from atoll.fleet.links.frames import Frame
from atoll.fleet.links.resident import Resident
from atoll.jobs.backends.edge_policy import EdgePolicy
from atoll.jobs.backends.work_orders import to_text
from atoll.jobs.backends.worker import Worker
from atoll.jobs.job import Job, prepared
from atoll.jobs.personal.asked import PERSONAL, TEXT, PersonalAnswer
from atoll.jobs.personal.copies import personal_copy, personal_order
from atoll.runs.events import EventLog
from atoll.split.host.audit import Audit

from tests.fleet.links.test_resident import SECTIONS
from tests.run_files import DEMO, merged, write_run

KIND = f"query.{PERSONAL}"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    sections = merged(SECTIONS, {"federated": {"personal_steps": 3}, "data": {"eval_rows": 4}})
    return prepared(load(write_run(tmp_path_factory.mktemp("config"), sections, over=DEMO)))


def question(job: Job, steps: int = 3) -> RecordDict:
    content, edge = RecordDict(), job.edges[0]
    put_adapter(content, job.start)
    order = personal_order(job, edge)
    order = replace(order, plan=replace(order.plan, num_steps=steps), total_steps=steps)
    content[WORK_ORDER] = ConfigRecord({"text": to_text(order, job.plan.pool, job.base.labels, "run1")})
    return content


def ask(folder: Path, job: Job, content: RecordDict, policy: EdgePolicy | None = None) -> tuple[Frame, str]:
    """The answer of a process that is started for it, and what its log says."""
    with EventLog(folder / "events.jsonl") as log:
        worker = Worker(job.loaded, "north", policy=policy)
        with Resident(worker, folder / "state", log, Audit(folder / "audit.jsonl")) as resident:
            answer = Frame.from_bytes(resident.answer(Frame(1, 1, KIND, "0", content).to_bytes()))
    return answer, (folder / "events.jsonl").read_text()


def test_a_copy_is_that_of_one_process_and_no_weight_leaves(job: Job, tmp_path: Path) -> None:
    answer, log = ask(tmp_path, job, question(job))
    assert answer.problem is None, answer.problem
    assert not [name for name, record in answer.content.items() if isinstance(record, ArrayRecord)], "weights stay"
    told = PersonalAnswer.from_text(str(answer.content.config_records[PERSONAL][TEXT]))
    assert (told.edge, set(told.scores)) == ("north", {"base", "federated", "personal"})
    assert log.count('"step_done"') == 3
    with EventLog(None) as silent:
        here = personal_copy(job, job.edges[0], personal_order(job, job.edges[0]), Common(job.start, None), silent)
    kept = load_adapter(tmp_path / "personal" / "run1")
    for name, part in here.state.modules.items():
        for a, b in zip(part.tensors, kept.modules[name].tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert here.work.to_numbers() == told.numbers
    again, log = ask(tmp_path, job, question(job))
    assert again.content.config_records == answer.content.config_records
    assert log.count('"step_done"') == 3, "asked again, it trains nothing"


@pytest.mark.parametrize(("steps", "policy", "says"), [
    (4, None, "4 steps a round"), (3, EdgePolicy(tasks=("federated",)), "task"), (3, EdgePolicy(steps=2), "3 steps a round"),
])  # fmt: skip
def test_more_than_run_toml_or_the_owner_lets_it_is_refused(
    steps: int, policy: EdgePolicy | None, says: str, job: Job, tmp_path: Path
) -> None:
    answer, _ = ask(tmp_path, job, question(job, steps), policy)
    assert answer.problem is not None
    assert says in answer.problem
    assert not (tmp_path / "personal").exists()


def test_a_run_without_copies_is_asked_for_none(job: Job, tmp_path: Path) -> None:
    federated = job.config.federated.model_copy(update={"personal_steps": None})
    loaded = replace(job.loaded, config=job.config.model_copy(update={"federated": federated}))
    answer, _ = ask(tmp_path, replace(job, loaded=loaded), question(job))
    assert answer.problem is not None
    assert "task" in answer.problem
