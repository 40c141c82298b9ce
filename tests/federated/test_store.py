"""Edges' states on disk: the same bits as in memory."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atoll.adapters.state import AdapterState
from atoll.cost.work import Work
from atoll.errors import AtollError, RunFolderError
from atoll.federated.client import EdgeWork, client_app
from atoll.federated.flower import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from atoll.federated.grid import InProcessGrid
from atoll.federated.payload import get_optimizer, get_statistics, put_optimizer, put_statistics, to_array, to_tensor
from atoll.federated.store import EdgeStates, read_record, write_record
from atoll.federated.strategy import AdapterStrategy
from atoll.selection.schedule import Schedule
from atoll.training.trainer import FitPlan, ModuleStatistics, Moments

from tests.conftest import random_model
from tests.federated.test_rounds import Told
from tests.pieces import adapters, selector, stream, trainer

NAMES = {1: "north", 2: "south", 7: "west"}


def test_a_record_comes_back_bit_for_bit(tmp_path: Path) -> None:
    record = RecordDict()
    record["floats"] = MetricRecord({"a": 0.1, "b": -0.0, "c": math.inf, "d": 5e-324, "e": [1.5, 2.5]})
    record["whole"] = MetricRecord({"big": 2**62, "one": 1, "one float": 1.0})
    record["text"] = ConfigRecord({"name": "ü\n", "list": ["a", "b"], "flag": True, "empty": []})
    tensors = {"fp32": torch.randn(3, 5), "bf16": torch.randn(4).bfloat16(), "none": torch.empty(0, 3)}
    record["arrays"] = ArrayRecord({name: to_array(tensor) for name, tensor in tensors.items()})
    record["no arrays"] = ArrayRecord({})
    write_record(tmp_path / "state", record)
    again = read_record(tmp_path / "state")
    assert list(again) == list(record)
    for name in ("floats", "whole", "text"):
        assert dict(again[name]) == dict(record[name])
        assert [type(value) for value in again[name].values()] == [type(value) for value in record[name].values()]
    assert math.copysign(1, again.metric_records["floats"]["b"]) == -1  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        assert torch.equal(to_tensor(again.array_records["arrays"][name]), tensor)
    assert not again.array_records["no arrays"]


def test_every_node_has_a_state_of_its_own_which_is_empty_at_first() -> None:
    states = EdgeStates(NAMES)
    assert (list(states), len(states)) == ([1, 2, 7], 3)
    context = states[2]
    assert (context.node_id, context.node_config, dict(context.state)) == (2, {"edge": "south"}, {})
    put_optimizer(context.state, {"a.b": Moments(torch.ones(3), torch.zeros(3), 7)})
    put_statistics(context.state, ModuleStatistics(("a.b",), {"a.b": 0.5}, None, {}, 1, 2, 3))
    assert not states[2].state, "what is not put back is lost"
    states[2] = context
    assert get_optimizer(states[2].state)["a.b"].num_steps == 7
    assert get_statistics(states[2].state).scores == {"a.b": 0.5}
    assert not states[7].state
    del states[2]
    assert list(states) == [1, 7]
    states.close()
    states.close()


def test_the_folder_is_private_and_gone_at_the_end() -> None:
    states = EdgeStates(NAMES)
    folder = states._folder
    assert folder.stat().st_mode & 0o077 == 0
    states[1] = states[1]
    assert len(list(folder.iterdir())) == 1
    states.close()
    assert not folder.exists()


def test_a_folder_that_is_a_link_to_another_place_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    for target in (elsewhere, tmp_path / "nowhere"):
        link = tmp_path / "states"
        link.symlink_to(target)
        with pytest.raises(RunFolderError, match="a link to another place") as caught:
            EdgeStates(NAMES, link)
        assert caught.value.where == str(link)
        link.unlink()
    assert [path.name for path in tmp_path.rglob("*")] == ["elsewhere", "precious"]


@pytest.mark.parametrize("selects", [False, True])
def test_rounds_with_states_on_disk_give_the_same_bits_as_in_memory(selects: bool) -> None:
    """Moments, step counts and the module statistics of an open window."""

    def run(*, on_disk: bool) -> tuple[AdapterState, list[float]]:
        start = adapters(random_model("llama"))
        works = {}
        for name in NAMES.values():
            engine = trainer(edge=name, total_steps=9)
            if selects:
                engine = _choosing(engine, start)
            works[name] = EdgeWork(name, engine, stream(name), 12, FitPlan(3, 1, False), True, lambda _: Work(), lambda *_: None)
        told, states = Told(), EdgeStates(NAMES)
        contexts = {node: Context(1, node, {"edge": name}, RecordDict(), {}) for node, name in NAMES.items()}
        app = client_app(lambda context: works[str(context.node_config["edge"])])
        strategy = AdapterStrategy(start, dict.fromkeys(works, start.ranks), NAMES, 3, told.observer)
        strategy.start(InProcessGrid(app, states if on_disk else contexts), strategy.arrays(), 3, 3600.0)
        states.close()
        return strategy.state, [edge.mean_loss for edge in told.edges]

    there, losses = run(on_disk=True)
    here, losses_here = run(on_disk=False)
    assert there.digest() == here.digest()
    assert losses == losses_here


def _choosing(engine: object, start: AdapterState) -> object:
    return replace(engine, selector=selector(start, Schedule(2, 5, ever=True), policy="kill-and-revive", keep=0.3))  # type: ignore[type-var]


def test_an_edge_that_fails_keeps_the_state_that_it_had() -> None:
    states = EdgeStates(NAMES)
    context = states[1]
    put_optimizer(context.state, {"a": Moments(torch.ones(1), torch.ones(1), 1)})
    states[1] = context

    class Fails:
        def fit(self, *_: object) -> None:
            raise AtollError("the disk is full")

    start = adapters(random_model("llama"))
    work = EdgeWork("north", Fails(), stream(), 12, FitPlan(1, 1, False), True, lambda _: Work(), lambda *_: None)  # type: ignore[arg-type]
    grid, told = InProcessGrid(client_app(lambda _: work), states), Told()
    strategy = AdapterStrategy(start, dict.fromkeys(NAMES.values(), start.ranks), NAMES, 0, told.observer)
    strategy.start(grid, strategy.arrays(), 1, 3600.0)
    assert len(told.dropped) == 3
    assert get_optimizer(states[1].state)["a"].num_steps == 1
    states.close()


def test_memory_holds_the_state_of_one_edge_at_a_time() -> None:
    names = {number: f"edge{number}" for number in range(1, 9)}
    start, alive = adapters(random_model("llama")), list[int]()
    seen: list[weakref.ref[Context]] = []

    def edge_of(context: Context) -> EdgeWork:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(context))
        name = str(context.node_config["edge"])
        return EdgeWork(name, trainer(edge=name), stream(name), 12, FitPlan(1, 1, False), True, lambda _: Work(), lambda *_: None)

    states, told = EdgeStates(names), Told()
    strategy = AdapterStrategy(start, dict.fromkeys(names.values(), start.ranks), names, 8, told.observer)
    strategy.start(InProcessGrid(client_app(edge_of), states), strategy.arrays(), 2, 3600.0)
    states.close()
    assert len(alive) == 16
    assert max(alive) <= 1
