"""An edge's process comes to the same bits as an edge in this process, and trains no round twice, whenever it is killed."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState
from atoll.config.load import LoadedConfig, load
from atoll.errors import RunFolderError
from atoll.federated.flower import ArrayRecord, ConfigRecord, Message, RecordDict
from atoll.federated.payload import WORK_ORDER, get_adapter, put_adapter
from atoll.federated.receipts import Ask
from atoll.fleet.links import resident as resident_module
from atoll.fleet.links.frames import Frame
from atoll.fleet.links.resident import Resident
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.edge_policy import EdgePolicy
from atoll.jobs.backends.fleet import CAPABILITIES, TEXT
from atoll.jobs.backends.in_process import InProcessBackend
from atoll.jobs.backends.work_orders import to_text
from atoll.jobs.backends.worker import Capabilities, Worker
from atoll.jobs.job import Job, prepared
from atoll.runs.events import EventLog
from atoll.split.host.audit import Audit

from tests.run_files import DEMO, Sections, write_run

SECTIONS: Sections = {
    "run": {"rounds": 7}, "data": {"train_rows": 30, "max_length": 64}, "adapter": {"rank": 2, "targets": "attention"},
    "train": {"learning_rate": 3e-3, "batch_size": 2, "local_steps": 2},
}  # fmt: skip
STEPS, LAST = 2, 5
"""Of a round; the last round that was trained."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    return load(write_run(tmp_path_factory.mktemp("config"), SECTIONS, over=DEMO))


@pytest.fixture(scope="module")
def job(loaded: LoadedConfig) -> Iterator[Job]:
    found = prepared(loaded)
    yield found
    found.close()


def work_order_of(job: Job, rounds_before: int = 0) -> WorkOrder:
    return WorkOrder("north", job.edges[0].plan, "federated", 6 * STEPS, rounds_before)


def asks(job: Job, number: int, adapter: AdapterState, run: str = "run1") -> RecordDict:
    content = RecordDict({"config": ConfigRecord({})})
    put_adapter(content, adapter)
    Ask(run, number, "federated", "north").put(content)
    content[WORK_ORDER] = ConfigRecord({TEXT: to_text(work_order_of(job), job.plan.pool, job.base.labels, run)})
    return content


def values(content: RecordDict) -> dict[str, object]:
    """All that is told, but for memory, and the receipt."""
    found: dict[str, object] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            found[name] = {key: (one.dtype, tuple(one.shape), one.data) for key, one in record.items()}
        elif name != "receipt":
            found[name] = {key: value for key, value in record.items() if key != "peak_bytes"}
    return found


@pytest.fixture(scope="module")
def here(job: Job, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[AdapterState, dict[str, object]]]:
    """What an edge in this process is sent in every round, and answers."""
    with EventLog(tmp_path_factory.mktemp("here") / "events.jsonl") as log:
        backend = InProcessBackend(job, job.edges[:1], "federated", log)
        backend.give(job, job.edges[:1], [work_order_of(job)])
        found, adapter = [], job.start
        for number in range(1, LAST + 1):
            (reply,) = backend.grid.send_and_receive([Message(asks(job, number, adapter), 1, "train", group_id=str(number))])
            found.append((adapter, values(reply.content)))
            adapter = get_adapter(reply.content)
        backend.close()
    return found


class Edge:
    """An edge's process, which can be killed and started again."""

    def __init__(self, loaded: LoadedConfig, folder: Path) -> None:
        self._loaded, self.folder = loaded, folder
        self.policy = EdgePolicy()
        folder.mkdir()
        self._log: EventLog | None = None
        self.start()

    def start(self) -> None:
        """Start it, after killing it if it runs."""
        self.stop()
        self._log = EventLog(self.folder / "events.jsonl")
        self._audit = Audit(self.folder / "audit.jsonl")
        self.resident = Resident(Worker(self._loaded, "north", policy=self.policy), self.folder / "state", self._log, self._audit)

    def stop(self) -> None:
        """Kill it."""
        if self._log is not None:
            self._log.close()
            self._audit.close()

    def answer(self, content: RecordDict, number: int, kind: str = "train") -> Frame:
        """Its answer to a question."""
        return Frame.from_bytes(self.resident.answer(Frame(3, 77, kind, str(number), content).to_bytes()))

    def events(self, kind: str) -> list[dict[str, object]]:
        """Its events of one kind."""
        return [line for line in map(json.loads, (self.folder / "events.jsonl").read_text().splitlines()) if line["event"] == kind]

    @property
    def steps(self) -> int:
        """That were trained in its life."""
        return len(self.events("step_done"))

    @property
    def rounds(self) -> Path:
        """Where its rounds of run1 are kept."""
        return self.folder / "state" / "run1" / "federated"


@pytest.fixture
def edge(loaded: LoadedConfig, tmp_path: Path) -> Iterator[Edge]:
    found = Edge(loaded, tmp_path / "north")
    yield found
    found.stop()


Here = list[tuple[AdapterState, dict[str, object]]]


def train(edge: Edge, job: Job, here: Here, *numbers: int) -> None:
    """These rounds, which come to what they come to here."""
    for number in numbers:
        answer = edge.answer(asks(job, number, here[number - 1][0]), number)
        assert answer.problem is None
        assert (answer.number, answer.node, answer.group) == (3, 77, str(number))
        assert values(answer.content) == here[number - 1][1]


def test_rounds_come_to_the_same_bits_as_in_one_process(edge: Edge, job: Job, here: Here) -> None:
    train(edge, job, here, 1, 2, 3)
    assert edge.steps == 3 * STEPS
    assert edge.folder.joinpath("state").stat().st_mode & 0o077 == 0


def test_the_same_question_again_gives_the_same_bytes_and_trains_nothing(edge: Edge, job: Job, here: Here) -> None:
    train(edge, job, here, 1)
    question = Frame(3, 77, "train", "2", asks(job, 2, here[1][0])).to_bytes()
    first = edge.resident.answer(question)
    assert edge.resident.answer(question) == first
    edge.start()
    assert edge.resident.answer(question) == first
    assert edge.steps == 2 * STEPS
    train(edge, job, here, 3)


def test_records_in_another_order_are_the_same_question(edge: Edge, job: Job, here: Here) -> None:
    content = asks(job, 1, here[0][0])
    first = edge.answer(content, 1)
    again = edge.answer(RecordDict(dict(reversed(list(content.items())))), 1)
    assert values(again.content) == values(first.content)
    assert edge.steps == STEPS


def test_killed_between_rounds_it_goes_on_from_disk(edge: Edge, job: Job, here: Here) -> None:
    for number in (1, 2, 3):
        train(edge, job, here, number)
        edge.start()
    assert edge.steps == 3 * STEPS


def test_what_is_kept_matters(edge: Edge, job: Job, here: Here) -> None:
    train(edge, job, here, 1)
    shutil.rmtree(edge.rounds)
    answer = edge.answer(asks(job, 2, here[1][0]), 2)
    assert values(answer.content) != here[1][1]


@pytest.mark.parametrize("left", ["nothing", "a stage", "half a stage"])
def test_a_round_that_was_cut_short_is_trained_again_from_the_state_before(edge: Edge, job: Job, here: Here, left: str) -> None:
    train(edge, job, here, 1, 2)
    edge.stop()
    stage = edge.rounds / ".stage-round-0002"
    if left == "nothing":
        shutil.rmtree(edge.rounds / "round-0002")
    else:
        (edge.rounds / "round-0002").rename(stage)
    if left == "half a stage":
        (stage / "question.txt").unlink()
        (stage / "state.record").write_bytes(b"{")
    edge.start()
    train(edge, job, here, 2, 3)
    assert edge.steps == 4 * STEPS
    assert not stage.exists()


@pytest.mark.parametrize("back", [1, 2])
def test_a_coordinator_that_goes_back_gets_the_same_answers_or_new_ones(edge: Edge, job: Job, here: Here, back: int) -> None:
    train(edge, job, here, *range(1, LAST + 1))
    first, steps = LAST - back + 1, edge.steps
    train(edge, job, here, *range(first, LAST + 1))
    assert edge.steps == steps, "it had answered the same"
    # Now from another common adapter: another edge was missing.
    other = edge.answer(asks(job, first, here[0][0]), first)
    assert edge.steps == steps + STEPS
    assert values(other.content) != here[first - 1][1]
    assert max(path.name for path in edge.rounds.iterdir()) == f"round-{first:04d}", "what came after does not hold any more"
    train(edge, job, here, first)
    assert not edge.events("advised")


def test_an_edge_that_was_away_goes_on_from_its_last_round_even_if_asked_twice(edge: Edge, job: Job, here: Here) -> None:
    train(edge, job, here, 1)
    far, adapter = 1 + 2 * resident_module.KEPT_ROUNDS, here[1][0]
    first = edge.answer(asks(job, far, adapter), far)
    again = edge.answer(RecordDict({**asks(job, far, adapter), "config": ConfigRecord({"a": 1})}), far)
    assert edge.steps == 3 * STEPS
    assert values(again.content) == values(first.content), "from the same state"
    assert not edge.events("advised")
    assert values(first.content)["adapter"] == here[1][1]["adapter"], "its own second round"


def test_only_the_last_rounds_are_kept(edge: Edge, job: Job, here: Here) -> None:
    train(edge, job, here, *range(1, LAST + 1))
    kept = range(LAST - resident_module.KEPT_ROUNDS + 1, LAST + 1)
    assert sorted(path.name for path in edge.rounds.iterdir()) == [f"round-{number:04d}" for number in kept]


def test_an_edge_that_comes_late_begins_anew_and_says_so(edge: Edge, job: Job, here: Here) -> None:
    answer = edge.answer(asks(job, 3, here[0][0]), 3)
    assert values(answer.content)["adapter"] == here[0][1]["adapter"], "as in its first round"
    (advised,) = edge.events("advised")
    assert "before round 3" in str(advised["advice"])


def test_another_run_does_not_see_the_state_of_the_first(edge: Edge, job: Job, here: Here) -> None:
    train(edge, job, here, 1, 2)
    answer = edge.answer(asks(job, 1, here[0][0], run="run2"), 1)
    assert values(answer.content)["adapter"] == here[0][1]["adapter"]
    assert edge.steps == 3 * STEPS
    train(edge, job, here, 3)
    edge.answer(asks(job, 1, here[0][0], run="../../run3"), 1)
    assert len(list((edge.folder / "state").iterdir())) == 3
    assert {path.name for path in edge.folder.iterdir()} == {"state", "events.jsonl", "audit.jsonl"}


def test_two_threads_with_the_same_question_train_once(edge: Edge, job: Job, here: Here) -> None:
    question = Frame(3, 77, "train", "1", asks(job, 1, here[0][0])).to_bytes()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(edge.resident.answer, [question, question])
    assert first == second
    assert edge.steps == STEPS


def test_an_edge_says_what_it_has(edge: Edge, loaded: LoadedConfig) -> None:
    answer = edge.answer(RecordDict(), 0, f"query.{CAPABILITIES}")
    capabilities = Capabilities.from_text(str(answer.content.config_records[CAPABILITIES][TEXT]))
    assert capabilities == Worker(loaded, "north").capabilities()
    assert (capabilities.edge, capabilities.num_rows, capabilities.labels) == ("north", 15, ())


def without(content: RecordDict, *names: str) -> RecordDict:
    return RecordDict({name: record for name, record in content.items() if name not in names})


@pytest.mark.parametrize("damage", [
    "no order", "no ask", "no adapter", "no modules", "empty", "order of another version", "order without text", "ask without round",
    "another round", "no number", "another kind",
])  # fmt: skip
def test_a_message_that_cannot_be_followed_is_answered_with_a_page(edge: Edge, job: Job, here: Here, damage: str) -> None:
    content, group, kind = asks(job, 1, here[0][0]), "1", "train"
    match damage:
        case "no order":
            content = without(content, WORK_ORDER)
        case "no ask":
            content = without(content, "ask")
        case "no adapter":
            content = without(content, "adapter", "adapter_config")
        case "no modules":
            put_adapter(content, AdapterState("lora", {}))
        case "empty":
            content = RecordDict()
        case "order of another version":
            content[WORK_ORDER] = ConfigRecord({TEXT: "{}"})
        case "order without text":
            content[WORK_ORDER] = ConfigRecord({"other": 1})
        case "ask without round":
            content["ask"] = ConfigRecord({"nonce": "a"})
        case "another round":
            group = "2"
        case "no number":
            group = ""
        case "another kind":
            kind = "evaluate"
    answer = Frame.from_bytes(edge.resident.answer(Frame(1, 77, kind, group, content).to_bytes()))
    assert answer.problem is not None
    assert answer.problem.startswith("error")
    assert not answer.is_lost
    assert not list(edge.folder.glob("state/*/*/round-*"))
    train(edge, job, here, 1)


def ordered(job: Job, number: int, adapter: AdapterState, **plan: object) -> RecordDict:
    """A question with an order that asks for something else."""
    content, order = asks(job, number, adapter), work_order_of(job)
    order = replace(order, plan=replace(order.plan, **plan))  # type: ignore[arg-type]
    content[WORK_ORDER] = ConfigRecord({TEXT: to_text(order, job.plan.pool, job.base.labels, "run1")})
    return content


def refused(edge: Edge, answer: Frame) -> str:
    """What both sides are told."""
    assert answer.problem is not None
    assert answer.problem.startswith("error F703")
    assert "edge north" in answer.problem
    assert edge.events("advised")[-1]["advice"] == answer.problem
    assert edge.steps == 0
    assert not list(edge.folder.glob("state/*/*/round-*"))
    return answer.problem


@pytest.mark.parametrize(("plan", "got"), [
    ({"num_steps": 10**9}, "1000000000 steps a round"), ({"bits": 4}, "bits 4"), ({"mode": "split"}, "mode 'split'"),
    ({"name": "south"}, "south"),
])  # fmt: skip
def test_an_order_beyond_run_toml_trains_nothing_and_both_sides_are_told(
    edge: Edge, job: Job, here: Here, plan: dict[str, object], got: str
) -> None:  # fmt: skip
    assert got in refused(edge, edge.answer(ordered(job, 1, here[0][0], **plan), 1))
    train(edge, job, here, 1)


def test_what_a_coordinator_asked_for_is_in_the_audit_log(edge: Edge, job: Job, here: Here) -> None:
    refused(edge, edge.answer(ordered(job, 1, here[0][0], num_steps=10**9), 1))
    train(edge, job, here, 1)
    found = [json.loads(line) for line in (edge.folder / "audit.jsonl").read_text().splitlines()]
    assert [(line["event"], line["tenant"], line["kind"], line["group"]) for line in found] == [
        ("asked", "coordinator", "train", "1"), ("asked", "coordinator", "train", "1"),
    ]  # fmt: skip
    assert found[0]["refused"].startswith("error F703")
    assert found[1]["sent_bytes"] > 1000
    assert "refused" not in found[1]


def test_an_adapter_that_is_not_the_orders_trains_nothing(edge: Edge, job: Job, here: Here) -> None:
    modules = here[0][0].modules
    large = fresh_adapters("lora", {name: one.size for name, one in modules.items()}, dict.fromkeys(modules, 64), 8, 0)
    assert "rank 64" in refused(edge, edge.answer(asks(job, 1, large), 1))
    assert "round 8" in refused(edge, edge.answer(asks(job, 8, here[0][0]), 8))


@pytest.mark.parametrize(("policy", "got"), [
    (EdgePolicy(steps=1), "2 steps a round"), (EdgePolicy(bytes=1000), "longer than this edge takes"),
    (EdgePolicy(tasks=("importance",)), "task"),
])  # fmt: skip
def test_what_the_owner_does_not_allow_trains_nothing(edge: Edge, job: Job, here: Here, policy: EdgePolicy, got: str) -> None:
    edge.policy = policy
    edge.start()
    assert got in refused(edge, edge.answer(asks(job, 1, here[0][0]), 1))


def test_a_round_that_takes_longer_than_the_owner_allows_is_given_up(edge: Edge, job: Job, here: Here) -> None:
    edge.policy = EdgePolicy(seconds=1e-9)
    edge.start()
    answer = edge.answer(asks(job, 1, here[0][0]), 1)
    assert answer.problem is not None
    assert "a round takes longer than this edge gives it" in answer.problem
    assert edge.steps == 1, "and no more"
    edge.policy = EdgePolicy(seconds=3600)
    edge.start()
    train(edge, job, here, 1, 2)


def test_a_question_for_importance_that_run_toml_does_not_ask_for_is_refused(edge: Edge, job: Job, here: Here) -> None:
    answer = edge.answer(asks(job, 1, here[0][0]), 0, "query")
    assert "task 'importance'" in refused(edge, answer)


def test_states_that_are_a_link_to_another_place_are_refused(edge: Edge, job: Job, here: Here, tmp_path: Path) -> None:
    """Old runs are deleted there."""
    elsewhere, state = tmp_path / "elsewhere", edge.folder / "state"
    for number in range(6):
        (elsewhere / f"precious{number}").mkdir(parents=True)
    state.symlink_to(elsewhere)
    with pytest.raises(RunFolderError, match="a link to another place"):
        edge.start()
    state.unlink()
    edge.start()
    (state / "run1").mkdir(parents=True)
    for link in (edge.rounds, edge.rounds.parent):
        if link.exists():
            link.rmdir()
        link.symlink_to(elsewhere)
        answer = edge.answer(asks(job, 1, here[0][0]), 1)
        assert answer.problem is not None
        assert "a link to another place" in answer.problem
        link.unlink()
    assert len(list(elsewhere.iterdir())) == 6
    train(edge, job, here, 1)


def test_a_full_disk_is_a_page_and_the_round_is_trained_again_later(
    edge: Edge, job: Job, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    train(edge, job, here, 1)

    def full(path: Path, record: RecordDict) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(resident_module, "write_record", full)
        answer = edge.answer(asks(job, 2, here[1][0]), 2)
    assert answer.problem is not None
    assert "R502" in answer.problem
    assert "No space left" in answer.problem
    train(edge, job, here, 2, 3)


@pytest.mark.parametrize(("problem", "told", "do"), [
    (RuntimeError("out of memory: tried to allocate 7 GB"), "tried to allocate 7 GB", "give it more memory"),
    (MemoryError(), "MemoryError", "give it more memory"),
    (IndexError("index out of range in self"), "IndexError: index out of range in self", "traceback.txt"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer", "traceback.txt"),
    (PermissionError(errno.EACCES, "Permission denied", "rows.csv"), "Permission denied", "traceback.txt"),
    *((kind("patient Anna"), kind.__name__, "traceback.txt") for kind in (
        ValueError, KeyError, TypeError, AttributeError, AssertionError, ZeroDivisionError, ImportError, EOFError, Exception, StopIteration,
        BaseException, SystemExit, GeneratorExit,
    )),
])  # fmt: skip
def test_whatever_goes_wrong_at_an_edge_is_told_to_both_sides_at_once(
    problem: BaseException, told: str, do: str, edge: Edge, job: Job, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Also what compiled libraries panic with, which is no Exception.

    And no row with it, which the message of another library's exception may quote.
    """
    def fails(*_: object) -> None:
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "work", fails)
        answer = edge.answer(asks(job, 1, here[0][0]), 1)
    page = str(answer.problem)
    assert "this edge cannot do its part" in page
    assert told in page
    assert do in page
    assert "test_resident.py, line" in page
    assert "Anna" not in page
    assert page in str(edge.events("advised")[-1]["advice"])
    assert type(problem).__name__ in (edge.folder / "traceback.txt").read_text()
    train(edge, job, here, 1)


def test_what_asks_an_edge_to_end_is_no_failure(edge: Edge, job: Job, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "work", ends)
        with pytest.raises(KeyboardInterrupt):
            edge.answer(asks(job, 1, here[0][0]), 1)
    train(edge, job, here, 1)


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b'{"a": {"arrays": {"x": ["float32", [1], "raw", 4611686018427387904]}}}\n'])
@pytest.mark.parametrize("file", ["answer.record", "state.record"])
def test_a_damaged_file_is_a_page(edge: Edge, job: Job, here: Here, file: str, data: bytes) -> None:
    train(edge, job, here, 1)
    (edge.rounds / "round-0001" / file).write_bytes(data)
    number = 1 if file == "answer.record" else 2
    answer = edge.answer(asks(job, number, here[number - 1][0]), number)
    assert file in str(answer.problem)


def test_an_edge_scores_modules_when_it_is_asked(tmp_path: Path) -> None:
    plan = {"policy": "fedpipe", "warmup_steps": 2, "ranks": [2], "bits": [16]}
    loaded = load(write_run(tmp_path, {**SECTIONS, "plan": plan}, over=DEMO))
    job = prepared(loaded)
    order = work_order_of(job)
    content = RecordDict({WORK_ORDER: ConfigRecord({TEXT: to_text(order, job.plan.pool, job.base.labels, "run1")})})
    with EventLog(tmp_path / "here.jsonl") as log:
        backend = InProcessBackend(job, job.edges[:1], "federated", log)
        backend.give(job, job.edges[:1], [order])
        (reply,) = backend.grid.send_and_receive([Message(content, 1, "query", group_id="0")])
        backend.close()
    job.close()
    edge = Edge(loaded, tmp_path / "north")
    answer = edge.answer(content, 0, "query")
    edge.stop()
    assert answer.problem is None
    assert set(answer.content.metric_records["scores"]) == set(job.plan.pool)
    assert values(answer.content) == values(reply.content)
