"""Asking edges for importance over the in-process grid: what an edge finds is what arrives, and what cannot be used is left out by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from atoll.adapters.places import module_size
from atoll.adapters.state import AdapterState
from atoll.config.schema import Train
from atoll.cost.formulas import Flops
from atoll.cost.work import Work
from atoll.errors import EdgesLostError, UpdateRefusedError
from atoll.federated.client import EdgeWork, client_app
from atoll.federated.flower import Context, Message, MessageType, MetricRecord, RecordDict
from atoll.federated.grid import InProcessGrid
from atoll.federated.importance_query import Asked, EdgeWarmUp, ask_importance
from atoll.federated.payload import num_bytes, put_adapter
from atoll.planner.importance import average
from atoll.split.cut import Cut
from atoll.training.importance_warmup import ModuleScores, WarmUp, warm_up
from atoll.training.trainer import FitPlan

from tests.conftest import random_model
from tests.pieces import adapters, stream, trainer
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

STEPS = 3
MODULES = ("a", "b")
STEP_WORK = Work(Flops(2, 3, 4))


def sizes_of(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    head = model.get_output_embeddings()
    return {name: module_size(m) or (0, 0) for name, m in model.named_modules() if module_size(m) and m is not head}


def how(edge: str) -> WarmUp:
    return WarmUp("svd-sensitivity", STEPS, 2, 4.0, Train(learning_rate=1e-2), 0, edge)


def work(edge: str, scores: Callable[[AdapterState | None], ModuleScores] | None, *, num_examples: int = 12) -> EdgeWork:
    own = None if scores is None else EdgeWarmUp(scores, lambda _: STEP_WORK)
    return EdgeWork(
        edge, trainer(), stream(edge), num_examples, FitPlan(STEPS, 1, False), True, lambda _: Work(), lambda *_: None, warm_up=own
    )


def importance_warm_up(edge: str) -> EdgeWork:
    """An edge that really warms up."""
    base = trainer().base
    return work(edge, lambda start: warm_up(base, sizes_of(base.model), stream(edge), how(edge), start))


def saying(edge: str, scores: Mapping[str, Any], num_examples: int = 12) -> EdgeWork:
    """An edge that says what it is told to."""
    return work(edge, lambda _: ModuleScores(scores, ()), num_examples=num_examples)


def ask(*works: EdgeWork, modules: tuple[str, ...] = MODULES, grid_of: type[InProcessGrid] = InProcessGrid, **given: Any) -> Asked:
    nodes = {number + 1: own.name for number, own in enumerate(works)}
    contexts = {node: Context(1, node, {"edge": name}, RecordDict(), {}) for node, name in nodes.items()}
    found = {own.name: own for own in works}
    return ask_importance(grid_of(client_app(lambda context: found[str(context.node_config["edge"])]), contexts), nodes, modules, **given)


def test_the_adapter_to_score_from_travels_as_asked() -> None:
    rounded = list[bool]()

    def scores(start: AdapterState | None) -> ModuleScores:
        assert start is not None
        rounded.extend(torch.equal(one.down_RI, one.down_RI.half().float()) for one in start.modules.values())
        return ModuleScores(dict.fromkeys(MODULES, 1.0), ())

    start = adapters(trainer().base.model)
    bytes_sent = [ask(work("north", scores), adapter=start, precision=precision).edges[0].down_bytes for precision in ("fp32", "fp16")]
    assert rounded == [False] * len(start.modules) + [True] * len(start.modules)
    assert bytes_sent[0] - bytes_sent[1] == start.num_bytes // 2


def test_the_coordinator_gets_what_the_edges_found() -> None:
    base = trainer().base
    modules = tuple(sizes_of(base.model))
    asked = ask(importance_warm_up("north"), replace(importance_warm_up("south"), num_examples=4), modules=modules)
    wanted = {edge: warm_up(base, sizes_of(base.model), stream(edge), how(edge)).scores for edge in ("north", "south")}
    assert [(own.edge, own.num_examples, own.scores) for own in asked.edges] == [
        ("north", 12, wanted["north"]), ("south", 4, wanted["south"]),
    ]  # fmt: skip
    assert not asked.left_out
    mean = average([(own.num_examples, own.scores) for own in asked.edges])
    assert mean[modules[0]] == pytest.approx((3 * wanted["north"][modules[0]] + wanted["south"][modules[0]]) / 4)


def test_what_an_answer_cost_comes_with_it() -> None:
    model = trainer().base.model
    start = adapters(model)
    bare, given = (ask(importance_warm_up("north"), modules=tuple(sizes_of(model)), adapter=adapter) for adapter in (None, start))
    (own,), (other,) = bare.edges, given.edges
    assert own.work == sum((STEP_WORK for _ in range(STEPS)), Work())
    assert own.peak_bytes > 0
    assert own.up_bytes > 8 * len(own.scores)
    record = RecordDict()
    put_adapter(record, start)
    assert (own.down_bytes, other.down_bytes) == (0, num_bytes(record))
    assert not own.wire.sent


def test_importance_is_found_from_the_common_adapter() -> None:
    model = trainer().base.model
    start = adapters(model)
    moved = AdapterState("lora", {n: replace(a, up_OR=torch.full_like(a.up_OR, 0.05)) for n, a in start.modules.items()})
    modules = tuple(sizes_of(model))
    first, fresh, later = (ask(importance_warm_up("north"), modules=modules, adapter=one).edges[0].scores for one in (None, start, moved))
    assert first == fresh != later
    assert later == warm_up(trainer().base, sizes_of(model), stream("north"), how("north"), moved).scores


def test_exchanges_with_a_host_are_counted() -> None:
    device, client = device_trainer("llama", Cut(1, 0), thread_host(served(random_model("llama", BLOCKS))))
    sizes = sizes_of(random_model("llama", BLOCKS))
    own = work("north", lambda start: warm_up(device.base, sizes, stream(), how("north"), start))
    (answer,) = ask(replace(own, account=client.account), modules=tuple(sizes)).edges
    assert answer.wire.sent["forward"] > 0
    assert answer.up_bytes > answer.wire.sent.total()
    assert answer.down_bytes == answer.wire.received.total() > 0


def test_nothing_crosses_for_rows_that_were_handed_over() -> None:
    (own,) = ask(replace(saying("north", {"a": 1.0}), uploaded_bytes=1000)).edges
    assert (own.up_bytes, own.down_bytes) == (0, 0)


def test_an_edge_may_score_some_modules_only() -> None:
    asked = ask(saying("north", {"a": 1.0, "b": 3.0}), saying("south", {"a": 2.0}))
    assert average([(own.num_examples, own.scores) for own in asked.edges]) == {"a": 1.5, "b": 3.0}


@pytest.mark.parametrize(
    ("scores", "num_examples", "got"),
    [
        ({"a": math.nan}, 12, "a = nan where"),
        ({"a": math.inf, "b": 1.0}, 12, "a = inf where"),
        ({"a": 1.0, "b": -0.5}, 12, "-0.5 for b"),
        ({"a": [1.0, 2.0]}, 12, "a = [1.0, 2.0] where"),
        ({"a": 1.0, "lm_head": 2.0}, 12, "a score of 'lm_head', which is no module of this run"),
        ({}, 12, "no score at all"),
        ({"a": 1.0}, 0, "0 examples"),
    ],
)
def test_scores_that_cannot_be_used_leave_their_edge_out_by_name(scores: dict[str, Any], num_examples: int, got: str) -> None:
    asked = ask(saying("north", {"a": 1.0}), saying("south", scores, num_examples))
    assert [own.edge for own in asked.edges] == ["north"]
    assert set(asked.left_out) == {"south"}
    assert "edge south" in asked.left_out["south"]
    assert got in asked.left_out["south"]


def test_an_edge_that_fails_or_cannot_score_is_left_out() -> None:
    def fails(_start: AdapterState | None) -> ModuleScores:
        raise UpdateRefusedError("the edge has no rows", where="edge east", got="nothing")

    asked = ask(work("east", fails), work("south", None), saying("north", {"a": 1.0}))
    assert [own.edge for own in asked.edges] == ["north"]
    assert "the edge has no rows" in asked.left_out["east"]
    assert "no warm-up" in asked.left_out["south"]


class Tampering(InProcessGrid):
    """Loses or changes a record of every answer on its way."""

    lost = ""
    changed: Mapping[str, Any] = {}

    def _handle(self, message: Message) -> Message:
        reply = super()._handle(message)
        if self.lost:
            del reply.content[self.lost]
        else:
            reply.content["metrics"] = MetricRecord(dict(reply.content.metric_records["metrics"]) | self.changed)
        return reply


@pytest.mark.parametrize(
    ("lost", "changed", "got"),
    [
        ("scores", {}, "no 'scores'"),
        ("metrics", {}, "no 'metrics'"),
        ("wire_up", {}, "no 'wire_up'"),
        ("", {"num_examples": 1.5}, "num_examples = 1.5 where a whole number from 0"),
        ("", {"num_active": [1, 2]}, "num_active = [1, 2] where"),
        ("", {"flops.head_flops": float("inf")}, "flops.head_flops = inf where"),
        ("", {"num_active": 10**400}, "num_active = a number of 1329 bits where"),
        ("", {"peak_bytes": 2**81}, "peak_bytes = "),
    ],
)
def test_answers_that_lack_something_are_refused(lost: str, changed: Mapping[str, Any], got: str) -> None:
    grid = type("Own", (Tampering,), {"lost": lost, "changed": changed})
    with pytest.raises(EdgesLostError, match="no edge found") as caught:
        ask(saying("north", {"a": 1.0}), grid_of=grid)
    assert f"0 of 1 edge; north: {got}" in caught.value.got


def test_edges_that_are_not_reached_in_time_are_named() -> None:
    with pytest.raises(EdgesLostError) as caught:
        ask(saying("north", {"a": 1.0}), timeout=-1.0)
    assert caught.value.got == "0 of 1 edge"


def test_an_edge_is_asked_when_its_turn_comes() -> None:
    """Memory holds one message at a time, and an answer is read before the next edge begins."""
    order: list[str] = []

    def edge(name: str) -> EdgeWork:
        def scores(_start: AdapterState | None) -> ModuleScores:
            order.append(name)
            return ModuleScores({"a": 1.0}, ())

        return work(name, scores)

    class Listening(InProcessGrid):
        def _accept(self, message: Message) -> str:
            order.append(f"message {message.metadata.dst_node_id} {message.metadata.group_id}")
            assert message.metadata.message_type == MessageType.QUERY
            return super()._accept(message)

    ask(edge("north"), edge("south"), grid_of=Listening, round_number=4)
    assert order == ["message 1 4", "north", "message 2 4", "south"]
