"""A run prepared without a row is the run that is prepared with all rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.config.load import LoadedConfig, load
from atoll.errors import BadValueError, ConflictError, EdgesLostError
from atoll.federated.flower import ConfigRecord, Error, Grid, Message, MessageType, MetricRecord, RecordDict, assume_identity
from atoll.federated.payload import WORK_ORDER
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.fleet import CAPABILITIES, TEXT, FleetBackend, ask_capabilities, differs, named, prepared_for_fleet
from atoll.jobs.backends.work_orders import from_text
from atoll.jobs.backends.worker import Capabilities, Worker
from atoll.jobs.job import prepared

from tests.jobs.backends.test_worker import ROWS, classes_config
from tests.jobs.conftest import Workplace
from tests.run_files import Sections

THREE: dict[str, dict[str, object]] = {"south": {"rank": 2}, "north": {}, "west": {"data": "west.csv", "mode": "split"}}
NODES = {5: "south", 2**63: "north", 9: "west"}


@pytest.fixture(autouse=True)
def west(place: Workplace) -> None:
    (place.folder / "west.csv").write_text("a,b\n" + "w1 w2,w90 w3 w4\n" * 5)


def config(place: Workplace, sections: Sections | None = None, edges: Mapping[str, Mapping[str, object]] = THREE) -> LoadedConfig:
    return load(place.config(edges, sections or {}))


def all_capabilities(loaded: LoadedConfig, *names: str) -> list[Capabilities]:
    return [Worker(loaded, edge.name).capabilities() for edge in loaded.config.edge if not names or edge.name in names]


TWO = {name: edge for name, edge in THREE.items() if name != "west"}


@pytest.mark.parametrize(("sections", "edges", "steps"), [
    ({}, THREE, "local_steps = 2"), ({}, TWO, "local_epochs = 1.5"), ({"data": {"train_rows": 20}}, TWO, "local_steps = 2"),
    ({"plan": {"policy": "fedpipe", "warmup_steps": 2}}, TWO, "local_steps = 2"),
], ids=["split", "epochs", "rows", "planner"])  # fmt: skip
def test_it_is_planned_as_with_all_rows_here(place: Workplace, sections: Sections, edges: dict[str, dict[str, object]], steps: str) -> None:
    path = place.config(edges, sections)
    path.write_text(path.read_text().replace("local_steps = 2", steps))
    loaded = load(path)
    here, away = prepared(loaded), prepared_for_fleet(loaded, all_capabilities(loaded), {}, "run1")
    try:
        assert away.plan == here.plan
        assert away.start.digest() == here.start.digest()
        assert [edge.name for edge in away.edges] == [edge.name for edge in here.edges]
        for one, other in zip(away.edges, here.edges, strict=True):
            assert (one.plan, one.num_rows, one.warm_up is None) == (other.plan, other.num_rows, other.warm_up is None)
            assert one.selector.schedule == other.selector.schedule
            assert one.examples is None
            assert one.batches is None
        assert (away.run_id, here.run_id) == ("run1", "")
        assert away.held_out is not None
    finally:
        here.close()


def test_a_fleet_of_chats_is_known_as_one_without_a_held_out_row(place: Workplace) -> None:
    own = {"train": "chat.jsonl", "eval": None, "eval_rows": None, "prompt": None, "completion": None}
    row = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    (place.folder / "chat.jsonl").write_text((json.dumps(row) + "\n") * 8)
    loaded = config(place, {"data": own}, {"north": {}, "south": {}})
    job = prepared_for_fleet(loaded, all_capabilities(loaded), {}, "run1")
    assert job.form is not None
    assert job.form.kind == "messages"
    texts = [replace(one, form="text") for one in all_capabilities(loaded)]
    assert prepared_for_fleet(loaded, texts, {}, "run1").form is None


def test_edges_that_say_nothing_are_left_out(place: Workplace) -> None:
    loaded = config(place)
    job = prepared_for_fleet(loaded, all_capabilities(loaded, "north", "west"), {"south": "no answer in 5 s"}, "run1")
    assert [edge.name for edge in job.edges] == ["north", "west"]
    assert [(one.name, one.why) for one in job.plan.left_out] == [("south", "no answer in 5 s")]
    assert [edge.name for edge in job.config.edge] == ["north", "west"]


def test_too_few_edges_end_the_run_before_it_begins(place: Workplace) -> None:
    loaded = config(place, {"federated": {"min_edges": 2}})
    with pytest.raises(EdgesLostError) as raised:
        prepared_for_fleet(loaded, all_capabilities(loaded, "north"), {"south": "no answer", "west": "error X"}, "run1")
    assert "1 of 3" in raised.value.got
    assert "west: error X" in raised.value.got
    with pytest.raises(EdgesLostError):
        prepared_for_fleet(config(place), [], dict.fromkeys(THREE, "no answer"), "run1")


def test_rows_stay_where_they_are(place: Workplace) -> None:
    loaded = config(place, {"run": {"compare": ["central"]}}, {"north": {}, "south": {}})
    with pytest.raises(ConflictError, match="stay where they are"):
        prepared_for_fleet(loaded, all_capabilities(loaded), {}, "run1")


@pytest.mark.parametrize(("what", "word"), [("config", "run.toml"), ("base", "base"), ("atoll", "version of Atoll")])
def test_edges_that_would_run_something_else_are_left_out_by_name(place: Workplace, what: str, word: str) -> None:
    loaded = config(place)
    said = all_capabilities(loaded)
    wrong = [replace(one, **{what: "0" * 64}) if one.edge == "north" else one for one in said]  # type: ignore[arg-type]
    job = prepared_for_fleet(loaded, wrong, {}, "run1")
    assert [edge.name for edge in job.edges] == ["south", "west"]
    ((name, why),) = [(one.name, one.why) for one in job.plan.left_out]
    assert name == "north"
    assert f"another {word} than the coordinator's: '000000000000', not" in why
    assert job.plan.edges == prepared_for_fleet(loaded, [one for one in said if one.edge != "north"], {}, "run1").plan.edges


def test_where_all_would_run_something_else_it_is_said_of_all(place: Workplace) -> None:
    loaded = config(place)
    wrong = [replace(one, config="0" * 64) for one in all_capabilities(loaded)]
    with pytest.raises(EdgesLostError) as raised:
        prepared_for_fleet(loaded, wrong, {}, "run1")
    assert "0 of 3" in raised.value.got
    assert raised.value.got.count("copy the run.toml that the coordinator has, or its run began with, to it") == 3


def test_an_edge_with_a_part_of_the_base_shows_none_of_it(place: Workplace) -> None:
    loaded = config(place)
    said = [replace(one, base="") if one.edge == "west" else one for one in all_capabilities(loaded)]
    assert len(prepared_for_fleet(loaded, said, {}, "run1").edges) == 3


def test_an_edge_with_too_few_rows_for_a_window_does_not_end_the_start(place: Workplace) -> None:
    loaded = config(place, {"select": {"policy": "kill-and-revive", "observe_steps": 2}}, TWO)
    said = all_capabilities(loaded)
    few = [replace(one, num_rows=1) if one.edge == "south" else one for one in said]
    job = prepared_for_fleet(loaded, few, {"east": "silent"}, "run1")
    assert [edge.name for edge in job.edges] == ["north"]
    assert {one.name for one in job.plan.left_out} == {"east", "south"}
    assert "no shorter than its period" in next(one.why for one in job.plan.left_out if one.name == "south")
    with pytest.raises(ConflictError, match="no shorter than its period"):
        prepared_for_fleet(loaded, [replace(one, num_rows=1) for one in said], {}, "run1")


def classes_of(place: Workplace, files: Mapping[str, str]) -> LoadedConfig:
    (place.folder / "classes.csv").write_text("\n".join(ROWS) + "\n")
    for name, labels in files.items():
        rows = [f"w{n} w{n + 1},{label}" for n, label in enumerate(labels.split())]
        (place.folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return load(classes_config(place, {name: {"data": f"{name}.csv"} for name in files}))


def test_the_classes_are_those_of_all_edges(place: Workplace) -> None:
    loaded = classes_of(place, {"north": "yes yes yes", "south": "no maybe no"})
    here, away = prepared(loaded), prepared_for_fleet(loaded, all_capabilities(loaded), {}, "run1")
    assert away.base.labels == here.base.labels == ("maybe", "no", "yes")
    assert away.start.digest() == here.start.digest()
    assert away.plan == here.plan


def test_one_class_in_all_is_nothing_to_tell_apart(place: Workplace) -> None:
    loaded = classes_of(place, {"north": "yes yes yes", "south": "yes yes"})
    with pytest.raises(BadValueError, match="no classes"):
        prepared_for_fleet(loaded, all_capabilities(loaded), {}, "run1")


class Told(Grid):
    """Answers with what it was given."""

    def __init__(self, answers: Mapping[int, RecordDict | Error]) -> None:
        self._answers = answers
        self.kinds: list[str] = []
        assume_identity(1, 0)

    run = property(lambda self: None)

    def set_run(self, run: object) -> None: ...
    def create_message(self, *_: object) -> Message: ...  # type: ignore[empty-body]
    def get_node_ids(self) -> Iterable[int]: ...  # type: ignore[empty-body]
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...  # type: ignore[empty-body]
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...  # type: ignore[empty-body]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for message in messages:
            self.kinds.append(message.metadata.message_type)
            if message.metadata.dst_node_id in self._answers:
                yield Message(self._answers[message.metadata.dst_node_id], reply_to=message)


def said(capabilities: Capabilities) -> RecordDict:
    return RecordDict({CAPABILITIES: ConfigRecord({TEXT: capabilities.to_text()})})


NORTH = Capabilities("north", 3, "messages", (), "base", "config", "0.1")


def test_edges_are_asked_what_they_have() -> None:
    grid = Told({9: said(replace(NORTH, edge="west")), 2**63: said(NORTH)})
    found, silent = ask_capabilities(grid, NODES, 7)
    assert [capabilities.edge for capabilities in found] == ["north", "west"]
    assert silent == {"south": "no answer in 7.0 s"}
    assert set(grid.kinds) == {f"{MessageType.QUERY}.{CAPABILITIES}"}


def test_what_an_edge_says_went_wrong_is_why_it_is_silent() -> None:
    found, silent = ask_capabilities(Told({5: Error(1, "error D201"), 9: Error(3), 2**63: said(NORTH)}), NODES, 7)
    assert [capabilities.edge for capabilities in found] == ["north"]
    assert silent == {"south": "error D201", "west": "code 3"}


def test_an_edge_with_another_edges_key_is_left_out() -> None:
    found, silent = ask_capabilities(Told({5: said(NORTH), 2**63: said(NORTH)}), NODES, 7)
    assert [one.edge for one in found] == ["north"]
    assert "it says that it is 'north'" in silent["south"]


def text(**changes: object) -> RecordDict:
    values = {"edge": "south", "num_rows": 3, "form": "text", "labels": [], "base": "base", "config": "config", "atoll": "0.1"}
    return RecordDict({CAPABILITIES: ConfigRecord({TEXT: json.dumps({**values, **changes})})})


@pytest.mark.parametrize("answer", [
    RecordDict(), RecordDict({CAPABILITIES: ConfigRecord({TEXT: "{}"})}), RecordDict({CAPABILITIES: ConfigRecord({"a": 1})}),
    RecordDict({CAPABILITIES: ConfigRecord({TEXT: b"x"})}), RecordDict({CAPABILITIES: MetricRecord({TEXT: 1})}),
    RecordDict({CAPABILITIES: ConfigRecord({TEXT: "[" * 100_000})}), text(num_rows=float("inf")), text(num_rows=10**400),
    text(num_rows="3"), text(num_rows=-1), text(labels="yes"), text(labels=[1]), text(labels=None), text(base=None), text(config=5),
    text(atoll=[]), text(edge={}), text(edge="x" * 10_000), text(more=1), text(edge="so\x1b[2J\nuth"),
])  # fmt: skip
def test_a_bad_answer_leaves_its_edge_out_by_name_and_the_others_begin(answer: RecordDict) -> None:
    grid = Told({5: answer, 2**63: said(NORTH)})
    found, silent = ask_capabilities(grid, NODES, 7)
    assert [one.edge for one in found] == ["north"]
    assert set(silent) == {"south", "west"}
    assert silent["south"].replace("\n", "").isprintable()
    assert not silent["south"].startswith("no answer")
    assert {name for name in named(grid, NODES, 7).values() if name.isidentifier()} == {"north"}


def test_of_two_nodes_with_one_name_one_counts() -> None:
    assert named(Told({5: said(NORTH), 9: said(NORTH), 2**63: said(replace(NORTH, edge="west"))}), NODES, 7) == {5: "north", 2**63: "west"}


def test_a_backend_gives_every_node_its_own_edges_order(place: Workplace, tmp_path: Path) -> None:
    loaded = config(place)
    job = prepared_for_fleet(loaded, all_capabilities(loaded), {}, "run1")
    grid = Told({})
    backend = FleetBackend(job, grid, NODES)
    assert (backend.nodes, backend.grid) == (NODES, grid)
    assert set(backend.base_digests) == {"north", "south"}
    backend.give(job, job.edges, [WorkOrder(edge.name, edge.plan, "federated", 4, 0) for edge in job.edges])
    for node, name in NODES.items():
        record = backend.work_order_record(node)
        assert record is not None
        sent = from_text(str(record[TEXT]))
        assert (sent.order.edge, sent.order.plan.ranks, sent.run_id) == (name, job.plan.edge(name).ranks, "run1")
        assert sent.pool == job.plan.pool
        assert WORK_ORDER not in record
    backend.save(tmp_path / "states")
    backend.restore(tmp_path / "states")
    backend.close()
    backend.close()
    assert not (tmp_path / "states").exists()


def test_a_run_that_an_edge_left_goes_on_with_the_run_toml_that_all_have(place: Workplace) -> None:
    loaded = config(place)
    job = prepared_for_fleet(loaded, all_capabilities(loaded), {}, "run1")
    fewer = tuple(edge for edge in loaded.config.edge if edge.name != "south")
    narrow = replace(loaded, config=loaded.config.model_copy(update={"edge": fewer}))
    left = [one for one in all_capabilities(loaded) if one.edge != "south"]
    again = prepared_for_fleet(narrow, left, {}, "run1", job.asked_for)
    assert [edge.name for edge in again.edges] == ["north", "west"]
    assert again.asked_for == job.asked_for
    with pytest.raises(EdgesLostError, match="too few"):
        prepared_for_fleet(narrow, left, {}, "run1")


def test_what_the_coordinator_was_given_on_top_is_to_be_given_to_the_edges_too() -> None:
    one, other = (Capabilities("north", 4, "", (), "base", config, "1") for config in ("a", "b"))
    assert differs(one, one, ("run.seed=7",)) is None
    said = differs(one, other, ("method=lora", 'data.prompt="{a} ->"')) or ""
    assert "give its `atoll fleet join` --set method=lora --set 'data.prompt=\"{a} ->\"', too, and copy" in said
