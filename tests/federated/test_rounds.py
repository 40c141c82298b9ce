"""Rounds over the in-process grid: one edge is plain training, unequal edges make one adapter, failures cost a round only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.cost.formulas import Flops
from atoll.cost.work import Work
from atoll.errors import AtollError, EdgesLostError, UpdateRefusedError
from atoll.federated.aggregation.edge_parts import EdgeParts
from atoll.federated.client import EdgeWork, client_app
from atoll.federated.flower import Context, Message, MessageType, RecordDict, assume_identity
from atoll.federated.grid import InProcessGrid
from atoll.federated.payload import get_adapter, get_optimizer, precision_of, put_adapter, put_optimizer, to_array, to_tensor
from atoll.federated.strategy import AdapterStrategy, EdgeResult, Observer, RoundResult
from atoll.selection.schedule import Schedule
from atoll.selection.selector import StepTokens
from atoll.training.trainer import Batches, FitPlan, Moments, StepReport, Trainer, TrainState, Update

from tests.conftest import random_model
from tests.pieces import adapters, selector, stream, trainer

STEPS = 3


class Told:
    """Keeps what the coordinator tells."""

    def __init__(self) -> None:
        self.dropped: list[tuple[int, str, str]] = []
        self.rounds: list[RoundResult] = []
        self.edges: list[EdgeResult] = []

    @property
    def observer(self) -> Observer:
        return Observer(
            lambda _: None, lambda _, edge: self.edges.append(edge), lambda *args: self.dropped.append(args), self.rounds.append
        )


def run(edges: dict[str, Trainer], ranks: dict[str, int], *, rounds: int = 2, min_edges: int = 1, keep: bool = True,
        timeout: float = 3600.0, aggregation: str = "exact-svd", precision: str = "fp32",
        parts: dict[str, slice] | None = None, votes: dict[str, int] | None = None) -> tuple[AdapterState, Told]:  # fmt: skip
    told, start = Told(), adapters(random_model("llama"), rank=max(ranks.values()))
    works = {
        name: EdgeWork(name, engine, stream(name), 12, FitPlan(STEPS, 1, False), keep, lambda _: Work(Flops(2, 3, 4)), lambda *_: None)
        for name, engine in edges.items()
    }
    nodes = {number + 1: name for number, name in enumerate(edges)}
    contexts = {node: Context(1, node, {"edge": name}, RecordDict(), {}) for node, name in nodes.items()}
    given = {name: list(start.modules)[(parts or {}).get(name, slice(None))] for name in edges}
    edge_ranks = {name: dict.fromkeys(given[name], rank) for name, rank in ranks.items()}
    strategy = AdapterStrategy(
        start, edge_ranks, nodes, min_edges, told.observer, aggregation, precision=precision, votes=votes or {}  # type: ignore[arg-type]
    )  # fmt: skip
    grid = InProcessGrid(client_app(lambda context: works[str(context.node_config["edge"])]), contexts)
    strategy.start(grid, strategy.arrays(), rounds, timeout)
    return strategy.state, told


class Watched:
    """A trainer that keeps what it was given."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.given: list[AdapterState] = []

    def fit(self, state: TrainState, batches: Batches, plan: FitPlan, on_step: Callable[[StepReport], None]) -> Update:
        self.given.append(state.adapter)
        return self.trainer.fit(state, batches, plan, on_step)


def test_one_edge_equals_plain_local_training_bit_for_bit() -> None:
    federated, _ = run({"north": trainer()}, {"north": 4})
    engine = trainer()
    start = TrainState(adapters(engine.base.model), {}, 0)
    plain = engine.fit(start, stream("north"), FitPlan(2 * STEPS, 1, False), lambda _: None)
    assert federated.digest() == plain.state.adapter.digest()


def test_a_rerun_gives_the_same_adapter() -> None:
    def edges() -> dict[str, Trainer]:
        return {"north": trainer(), "south": trainer(edge="south", dropout=0.2)}

    first, _ = run(edges(), {"north": 4, "south": 2})
    second, _ = run(edges(), {"north": 4, "south": 2})
    assert first.digest() == second.digest()


def test_edges_of_unequal_rank_make_one_adapter() -> None:
    state, told = run({"north": trainer(), "south": trainer(edge="south")}, {"north": 4, "south": 2})
    assert set(state.ranks.values()) == {4}
    assert [edge.edge for edge in told.rounds[-1].edges] == ["north", "south"]
    assert 0 < told.rounds[0].discarded_share < 1
    assert all(edge.up_bytes > 0 and edge.peak_bytes > 0 and edge.num_steps == STEPS for edge in told.edges)
    assert told.edges[0].up_bytes > told.edges[1].up_bytes, "a smaller rank sends less"


def test_votes_are_shares_of_the_exact_mean() -> None:
    def edges(*names: str) -> dict[str, Trainer]:
        return {name: trainer(edge=name) for name in names}

    alone = [run(edges(name), {name: 4}, rounds=1)[0] for name in ("north", "south")]
    both, _ = run(edges("north", "south"), {"north": 4, "south": 4}, rounds=1, aggregation="residual", votes={"north": 3})
    for name, adapter in both.modules.items():
        north, south = (state.modules[name].delta_OI() for state in alone)
        torch.testing.assert_close(adapter.delta_OI(), (3 * north + south) / 4, rtol=1e-4, atol=1e-6)


def test_another_plan_brings_other_votes() -> None:
    start = adapters(random_model("llama"), rank=4)
    strategy = AdapterStrategy(start, {"north": start.ranks}, {1: "north"}, 1, Told().observer, votes={"north": 2.0})
    strategy.replan({"north": start.ranks}, {"north": 0.5}, start)
    assert strategy.votes == {"north": 0.5}


def test_forgetting_the_optimizer_is_another_training() -> None:
    kept, _ = run({"north": trainer()}, {"north": 4})
    reset, _ = run({"north": trainer()}, {"north": 4}, keep=False)
    assert kept.digest() != reset.digest()


def test_an_edge_has_no_say_in_modules_that_it_did_not_train() -> None:
    """Each edge trains one end of the model; the other's modules come out as the other trained them, bit for bit."""
    start = adapters(random_model("llama"))
    ends = {"north": "last-layers", "south": "random"}
    edges = {
        name: replace(trainer(edge=name), selector=selector(start, Schedule(0, None, ever=True), policy=policy, keep=0.2))
        for name, policy in ends.items()
    }
    together, told = run(edges, {"north": 4, "south": 4}, rounds=1)  # type: ignore[arg-type]
    trained = {name: set(edge.selector.choose({}, StepTokens(1, 1), 0)) for name, edge in edges.items()}  # type: ignore[union-attr]
    assert trained["north"] != trained["south"]
    for name, names in trained.items():
        alone, _ = run({name: edges[name]}, {name: 4}, rounds=1)  # type: ignore[dict-item]
        for module in names - trained["south" if name == "north" else "north"]:
            assert torch.equal(together.modules[module].up_OR, alone.modules[module].up_OR)
    for module in set(start.modules) - trained["north"] - trained["south"]:
        assert torch.equal(together.modules[module].up_OR, start.modules[module].up_OR)
    assert all(edge.up_bytes < edge.down_bytes for edge in told.rounds[0].edges), "what was not trained does not travel"


class Broken:
    """A trainer that returns what it should not."""

    def __init__(self, breaks: Callable[[TrainState], AdapterState]) -> None:
        self._breaks = breaks

    def fit(self, state: TrainState, batches: object, plan: FitPlan, on_step: Callable[[StepReport], None]) -> Update:
        report = StepReport(state.step, 1.0, 1e-3, 1.0, 8, 4, ((1, 8),), tuple(state.adapter.modules))
        return Update(TrainState(self._breaks(state), {}, state.step + plan.num_steps), (report,))


def _raise(_state: TrainState) -> AdapterState:
    raise AtollError("the disk is full")


def _filled(state: TrainState, value: float) -> AdapterState:
    modules = {n: ModuleAdapter(a.down_RI, torch.full_like(a.up_OR, value), a.scaling) for n, a in state.adapter.modules.items()}
    return AdapterState(state.adapter.kind, modules)


def _resized(state: TrainState) -> AdapterState:
    modules = {n: ModuleAdapter(a.down_RI[:, 1:], a.up_OR, a.scaling) for n, a in state.adapter.modules.items()}
    return AdapterState(state.adapter.kind, modules)


FAULTS = {
    "not finite": lambda state: _filled(state, float("nan")),
    "disk is full": _raise,
    "does not fit the common adapter": _resized,
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_bad_edge_is_left_out_by_name_and_the_round_goes_on(fault: str) -> None:
    state, told = run({"north": trainer(), "bad": Broken(FAULTS[fault])}, {"north": 4, "bad": 4})  # type: ignore[dict-item]
    assert [(number, edge) for number, edge, _ in told.dropped] == [(1, "bad"), (2, "bad")]
    assert all(fault in reason for _, _, reason in told.dropped)
    alone, _ = run({"north": trainer()}, {"north": 4})
    assert state.digest() == alone.digest()


def test_too_few_edges_end_the_run() -> None:
    with pytest.raises(EdgesLostError, match="round 1 got too few updates") as caught:
        run({"north": trainer(), "bad": Broken(_raise)}, {"north": 4, "bad": 4}, min_edges=2)  # type: ignore[dict-item]
    assert caught.value.got == "1 of 2 edges; bad: error: the disk is full"


def test_a_round_that_takes_too_long_goes_on_without_the_rest() -> None:
    with pytest.raises(EdgesLostError):
        run({"north": trainer()}, {"north": 4}, timeout=-1.0)


def test_every_number_format_survives_the_message_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        array = to_array(tensor)
        assert torch.equal(to_tensor(array), tensor)
        assert len(array.data) == 15 * dtype.itemsize


def test_records_come_back_as_they_were() -> None:
    state, record = adapters(random_model("llama")), RecordDict()
    put_adapter(record, state)
    assert get_adapter(record).digest() == state.digest()
    assert get_optimizer(record) == {}
    put_optimizer(record, {"a.b": Moments(torch.ones(3), torch.zeros(3), 7)})
    read = get_optimizer(record)["a.b"]
    assert (read.first.tolist(), read.second.tolist(), read.num_steps) == ([1, 1, 1], [0, 0, 0], 7)


def test_fp16_takes_half_the_bytes_and_comes_back_as_the_nearest_fp32() -> None:
    change = FullWeightDelta(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.full((5,), 1e-6))
    state = AdapterState("lora", adapters(random_model("llama")).modules, {"score": change})
    halved, whole = RecordDict(), RecordDict()
    put_adapter(halved, state, precision="fp16")
    put_adapter(whole, state)
    assert (precision_of(halved), precision_of(whole)) == ("fp16", "fp32")
    sizes = [sum(len(array.data) for array in record.array_records["adapter"].values()) for record in (halved, whole)]
    assert 2 * sizes[0] == sizes[1] == state.num_bytes
    read = get_adapter(halved)
    for name, adapter in state.modules.items():
        for sent, came in ((adapter.down_RI, read.modules[name].down_RI), (adapter.up_OR, read.modules[name].up_OR)):
            assert came.dtype == torch.float32
            assert torch.equal(came, sent.half().float())
    assert all(torch.equal(a, b.half().float()) for a, b in zip(read.full_weights["score"].tensors, change.tensors, strict=True))
    # The coordinator's own copy of what it sends is rounded already.
    for ranks in (state.ranks, dict.fromkeys(state.modules, 2)):
        sent = EdgeParts(state, "exact-svd", "fp16").of(ranks)
        put_adapter(halved, sent, precision="fp16")
        assert get_adapter(halved).digest() == sent.digest()


@pytest.mark.parametrize("rule", ["exact-svd", "delta-svd", "zero-pad", "residual", "stack"])
def test_with_fp16_both_sides_know_the_numbers_that_travelled_and_little_is_lost(rule: str) -> None:
    ranks = {"north": 4, "south": 2}
    watched = {name: Watched(trainer(edge=name)) for name in ranks}
    halved, told = run(dict(watched), ranks, aggregation=rule, precision="fp16")
    exact, before = run({name: trainer(edge=name) for name in ranks}, ranks, aggregation=rule)
    for given in watched["north"].given + watched["south"].given:
        assert all(torch.equal(adapter.down_RI, adapter.down_RI.half().float()) for adapter in given.modules.values())
    assert 0.5 < told.edges[0].up_bytes / before.edges[0].up_bytes < 0.7
    for name, adapter in exact.modules.items():
        most = float(adapter.delta_OI().abs().max())
        torch.testing.assert_close(halved.modules[name].delta_OI(), adapter.delta_OI(), rtol=0, atol=0.02 * most)


@pytest.mark.parametrize("damage", ["missing", "short", "kind", "type"])
def test_a_damaged_message_is_refused(damage: str) -> None:
    record = RecordDict()
    put_adapter(record, adapters(random_model("llama")))
    arrays, config = record.array_records["adapter"], record.config_records["adapter_config"]
    first = next(iter(arrays))
    if damage == "missing":
        del arrays[first]
    elif damage == "short":
        arrays[first].data = arrays[first].data[:-1]
    elif damage == "type":
        arrays[first].stype = "numpy.ndarray"
    else:
        config["kind"] = "prefix"
    with pytest.raises(UpdateRefusedError, match="does not hold an adapter"):
        get_adapter(record)


def test_flower_still_lets_us_make_messages() -> None:
    """The internal names we use: a new Flower version that moves them fails here."""
    assume_identity(2, 3)  # an app of Flower's that ran in this process before
    grid = InProcessGrid(client_app(lambda _: None), {7: Context(1, 7, {}, RecordDict(), {})})  # type: ignore[arg-type, return-value]
    message = grid.create_message(RecordDict(), MessageType.TRAIN, 7, "1")
    assert isinstance(message, Message)
    assert (message.metadata.run_id, message.metadata.src_node_id, message.metadata.dst_node_id) == (grid.run.run_id, 0, 7)
    assert list(grid.get_node_ids()) == [7]
