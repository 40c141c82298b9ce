"""What an edge on a machine of its own says, and what it makes of an order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.config.load import LoadedConfig, load
from atoll.errors import HostRefusedError, ProtocolError
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.work_orders import SentOrder
from atoll.jobs.backends.worker import Capabilities, Worker, asked_for
from atoll.jobs.job import prepared
from atoll.runs.events import Advised, DataLoaded

from tests.jobs.conftest import Workplace

TWO: dict[str, dict[str, object]] = {"north": {}, "south": {"rank": 2}}
NAME = st.text(max_size=8)


@given(st.builds(Capabilities, NAME, st.integers(0, 2**40), NAME, st.lists(NAME, max_size=3).map(tuple), NAME, NAME, NAME))
def test_a_hello_comes_back(capabilities: Capabilities) -> None:
    assert Capabilities.from_text(capabilities.to_text()) == capabilities


CAPABILITIES = Capabilities("north", 5, "text", ("a",), "base", "config", "0.1").to_text()

NO_ROWS = ('"x"', "Infinity", "1e400", "5.0", "-1", "true", "9" * 400)


@pytest.mark.parametrize("text", [
    "", "None", "5", "[]", "{}", CAPABILITIES[:-1], CAPABILITIES[:-1] + ', "other": 1}',
    *(CAPABILITIES.replace('"num_rows": 5', f'"num_rows": {rows}') for rows in NO_ROWS), "[" * 100_000,
    *(CAPABILITIES.replace('["a"]', labels) for labels in ("[" * 100_000, '"abc"', "[1]")),
    CAPABILITIES.replace("north", "x" * 10_000), json.dumps({**json.loads(CAPABILITIES), "labels": ["x"] * 10_001}),
])  # fmt: skip
def test_a_hello_of_another_version_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        Capabilities.from_text(text)


@pytest.fixture
def loaded(place: Workplace) -> LoadedConfig:
    return load(place.config(TWO, {}))


def test_copies_that_name_other_places_ask_for_the_same(place: Workplace, loaded: LoadedConfig, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = (place.folder / "run.toml").read_text()
    places = {str(place.base): "/models/base", 'train = "rows.csv"': 'train = "mine.csv"', 'eval = "rows.csv"': 'eval = "held.csv"'}
    for old, new in places.items():
        assert old in text
        text = text.replace(old, new)
    text = text.replace('name = "north"', 'name = "north"\ndata = "my/own.csv"')
    (elsewhere / "run.toml").write_text(text)
    assert asked_for(load(elsewhere / "run.toml").config) == asked_for(loaded.config)


@pytest.mark.parametrize("change", [
    "train.learning_rate=0.5", "run.rounds=7", "run.seed=1", "adapter.rank=8", "data.max_length=8", "federated.min_edges=2",
    "data.train_rows=9",
])  # fmt: skip
def test_copies_that_differ_otherwise_do_not(loaded: LoadedConfig, change: str) -> None:
    assert asked_for(load(loaded.path, [change]).config) != asked_for(loaded.config)


def test_copies_with_other_edges_do_not(place: Workplace, loaded: LoadedConfig) -> None:
    for edges in ({"north": {}}, {**TWO, "west": {}}, {"north": {}, "south": {"rank": 3}}):
        assert asked_for(load(place.config(edges, {})).config) != asked_for(loaded.config)


def test_an_edge_has_the_rows_that_it_has_in_one_process(loaded: LoadedConfig) -> None:
    job = prepared(loaded)
    for edge in job.edges:
        worker = Worker(loaded, edge.name)
        assert worker.capabilities().num_rows == edge.num_rows
        assert worker.capabilities().config == asked_for(loaded.config)
        own, participant = worker.work(SentOrder(WorkOrder(edge.name, edge.plan, "federated", 4, 0), job.plan.pool, (), "run"))
        assert participant.examples is not None
        assert edge.examples is not None
        assert [one.token_ids.tolist() for one in participant.examples.items] == [one.token_ids.tolist() for one in edge.examples.items]
        assert (participant.name, participant.plan) == (edge.name, edge.plan)
        assert own.plan.pool == job.plan.pool
        worker.close()
        worker.close()


def test_an_edge_tells_its_owner_what_becomes_of_its_rows(place: Workplace) -> None:
    config = place.config(TWO, {"data": {"on_bad_row": "skip", "max_length": 8}})
    (place.folder / "rows.csv").write_text("a,b\n" + "w1,w2 </s>\n,w3\nw1,w2 w3 w4 w5 w6 w7 w8 w9\n" * 9)
    loaded = load(config)
    job, worker = prepared(loaded), Worker(loaded, "north")
    assert worker.untold() == ()
    worker.work(SentOrder(WorkOrder("north", job.edges[0].plan, "federated", 4, 0), job.plan.pool, (), "run"))
    special, loaded_rows = worker.untold()
    assert isinstance(special, Advised)
    assert "'</s>' as text" in special.advice
    assert isinstance(loaded_rows, DataLoaded)
    assert (loaded_rows.num_rows > 0, loaded_rows.num_skipped > 0, loaded_rows.num_truncated > 0) == (True, True, True)
    assert worker.untold() == ()


def test_a_base_is_loaded_once_for_orders_that_ask_for_the_same(loaded: LoadedConfig) -> None:
    job, worker = prepared(loaded), Worker(loaded, "north")
    order = WorkOrder("north", job.edges[0].plan, "federated", 4, 0)
    first, _ = worker.work(SentOrder(order, job.plan.pool, (), "run"))
    again, _ = worker.work(SentOrder(replace(order, rounds_before=1), job.plan.pool, (), "other"))
    assert again.base is first.base
    narrow, _ = worker.work(SentOrder(replace(order, plan=replace(order.plan, bits=8)), job.plan.pool, (), "run"))
    assert narrow.base is not first.base
    assert set(narrow.bases) == {8}


def test_a_plan_for_a_host_that_nobody_named_is_refused(loaded: LoadedConfig) -> None:
    job, worker = prepared(loaded), Worker(loaded, "north")
    plan = replace(job.edges[0].plan, mode="split")
    with pytest.raises(HostRefusedError, match="no host"):
        worker.work(SentOrder(WorkOrder("north", plan, "federated", 4, 0), job.plan.pool, (), "run"))
    worker.work(SentOrder(WorkOrder("north", job.edges[0].plan, "federated", 4, 0), job.plan.pool, (), "run"))


ROWS = ["text,label", *(f"w{n} w{n + 1},{'yes' if n % 2 else 'no'}" for n in range(8))]
CLASSES = {
    "model": {"task": "classify"}, "data": {"train": "classes.csv", "eval": "classes.csv", "text": "{text}", "label": "label"},
}  # fmt: skip


def test_an_edge_that_knows_one_class_numbers_it_as_the_run_does(place: Workplace) -> None:
    """And anew when the next run has more classes, though the rows are the same."""
    (place.folder / "north.csv").write_text("\n".join([ROWS[0], *(row for row in ROWS if row.endswith(",yes"))]) + "\n")
    (place.folder / "classes.csv").write_text("\n".join(ROWS) + "\n")
    loaded = load(classes_config(place, {"north": {"data": "north.csv"}, "south": {}}))
    worker = Worker(loaded, "north")
    assert worker.capabilities().labels == ("yes",)
    job = prepared(loaded)
    order = WorkOrder("north", job.edges[0].plan, "federated", 4, 0)
    for labels in (("no", "yes"), ("maybe", "no", "yes"), ("no", "yes")):
        _, edge = worker.work(SentOrder(order, job.plan.pool, labels, "run"))
        assert edge.examples is not None
        assert {one.label for one in edge.examples.items} == {labels.index("yes")}


def classes_config(place: Workplace, edges: dict[str, dict[str, object]]) -> Path:
    """A run.toml that classifies."""
    path = place.config(edges, CLASSES)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith(("prompt", "completion"))) + "\n")
    return path
