"""Answers that must not count: refused by name, and the round comes out as if the edge had said nothing, to the last bit."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import EdgesLostError
from atoll.federated.aggregation.robust import Robust
from atoll.federated.aggregation.spool import Contribution, Spool
from atoll.federated.flower import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from atoll.federated.payload import get_adapter, put_adapter
from atoll.federated.receipts import Ask

from tests.federated.meddling import START, federate, late

BAD, BAD_NODE = "edge1", 2
MAX_NORM = 50.0
Fault = Callable[[Message, Message], Iterable[Message]]
"""Given the bad edge's reply and its reply of the round before."""


def with_adapter(change: Callable[[AdapterState], AdapterState]) -> Fault:
    def fault(reply: Message, before: Message) -> Iterable[Message]:
        put_adapter(reply.content, change(get_adapter(reply.content)))
        return [reply]

    return fault


def of_a(change: Callable[[ModuleAdapter], ModuleAdapter]) -> Fault:
    return with_adapter(lambda state: AdapterState(state.kind, {**state.modules, "a": change(state.modules["a"])}, state.full_weights))


def filled(value: float) -> Fault:
    return of_a(lambda one: ModuleAdapter(one.down_RI, torch.full_like(one.up_OR, value), one.scaling))


def receipt(key: str, value: str | int | None) -> Fault:
    def fault(reply: Message, before: Message) -> Iterable[Message]:
        record = dict(reply.content.config_records["receipt"])
        record.pop(key)
        reply.content["receipt"] = ConfigRecord(record if value is None else {**record, key: value})
        return [reply]

    return fault


def figures(key: str, value: object) -> Fault:
    def fault(reply: Message, before: Message) -> Iterable[Message]:
        numbers = dict(reply.content.metric_records["metrics"])
        numbers.pop(key)
        reply.content["metrics"] = MetricRecord(numbers if value is None else {**numbers, key: value})  # type: ignore[dict-item]
        return [reply]

    return fault


def with_record(name: str, record: ArrayRecord | ConfigRecord | MetricRecord) -> Fault:
    def fault(reply: Message, before: Message) -> Iterable[Message]:
        reply.content[name] = record
        return [reply]

    return fault


def array(key: str, made: Callable[[Array], Array]) -> Fault:
    """Another array in place of one of the adapter's."""

    def fault(reply: Message, before: Message) -> Iterable[Message]:
        arrays = reply.content.array_records["adapter"]
        arrays[key] = made(arrays["a/down"])
        return [reply]

    return fault


def reshaped(*shape: int) -> Fault:
    return array("a/down", lambda one: Array(one.dtype, shape, one.stype, one.data))


def config(key: str, value: object) -> Fault:
    def fault(reply: Message, before: Message) -> Iterable[Message]:
        reply.content["adapter_config"] = ConfigRecord({**reply.content.config_records["adapter_config"], key: value})  # type: ignore[dict-item]
        return [reply]

    return fault


def without(key: str) -> Fault:
    def fault(reply: Message, before: Message) -> Iterable[Message]:
        del reply.content[key]
        return [reply]

    return fault


def replayed(reply: Message, before: Message) -> Iterable[Message]:
    return [before]


def twice(reply: Message, before: Message) -> Iterable[Message]:
    return [reply, reply]


def from_elsewhere(reply: Message, before: Message) -> Iterable[Message]:
    reply.metadata.__dict__["_src_node_id"] = 99
    return [reply]


FAULTS: dict[str, tuple[Fault, str]] = {
    "NaN": (filled(float("nan")), "numbers that are not finite"),
    "infinite": (filled(float("inf")), "NaN or infinity in a"),
    "square overflows": (filled(1e20), "an update is too large"),
    "huge factor": (of_a(lambda one: ModuleAdapter(one.down_RI * 1e6, one.up_OR * 1e-6, one.scaling)), "factors with a norm"),
    "huge product": (filled(1e3), "expected  at most 50"),
    "wrong scaling": (of_a(lambda one: ModuleAdapter(one.down_RI, one.up_OR, 1e9)), "scaling 1000000000.0"),
    "NaN scaling": (of_a(lambda one: ModuleAdapter(one.down_RI, one.up_OR, float("nan"))), "scaling nan"),
    "wrong shape": (of_a(lambda one: ModuleAdapter(one.down_RI[:, 1:], one.up_OR, one.scaling)), "(inputs, outputs) = (6, 9)"),
    "wrong rank": (of_a(lambda one: ModuleAdapter(one.down_RI[:1], one.up_OR[:, :1], one.scaling)), "rank 1"),
    "wrong type": (of_a(lambda one: ModuleAdapter(one.down_RI.bfloat16(), one.up_OR, one.scaling)), "bfloat16 and float32"),
    "unknown module": (
        with_adapter(lambda s: AdapterState(s.kind, {"z": s.modules["a"]}, s.full_weights)), "a module that the edge was given"
    ),
    "unknown weight": (
        with_adapter(lambda s: AdapterState(s.kind, {}, {"a": FullWeightDelta(torch.zeros(9, 7))})), "of a module that the edge was given"
    ),
    "wrong kind": (with_adapter(lambda state: AdapterState("bottleneck", state.modules)), "a bottleneck adapter"),
    "wrong hash": (receipt("base", "0" * 64), "wrong hash"),
    "no hash": (receipt("base", None), "wrong hash"),
    "replayed": (replayed, "round 1"),
    "another run": (receipt("nonce", Ask("run-0002", 1, "federated", "edge1").nonce), "nonce"),
    "another phase": (receipt("nonce", Ask("run-0001", 1, "local-only", "edge1").nonce), "nonce"),
    "another nonce": (receipt("nonce", Ask("run-0001", 2, "federated", "edge0").nonce), "nonce"),
    "another edge": (receipt("edge", "edge0"), "edge 'edge0'"),
    "no receipt": (without("receipt"), "without a receipt"),
    "no figures": (without("metrics"), "no 'metrics'"),
    "no adapter": (without("adapter"), "does not hold an adapter"),
    "a figure missing": (figures("num_tokens", None), "no 'num_tokens'"),
    "duplicate": (twice, "a second answer in one round"),
    "no examples": (figures("num_examples", 0), "an update without data"),
    "fewer than none": (figures("num_examples", -3), "num_examples = -3"),
    "half an example": (figures("num_examples", 1.5), "num_examples = 1.5"),
    "a list of examples": (figures("num_examples", [1, 2]), "num_examples = [1, 2]"),
    "more examples than before": (figures("num_examples", 10**9), "number of examples changed"),
    "more examples than there can be": (figures("num_examples", 2**62), "more data than there can be"),
    "infinite work": (figures("flops.block_flops", float("inf")), "flops.block_flops = inf"),
    "more work than there can be": (figures("flops.adapter_flops", 10**400), "flops.adapter_flops = a number of 1329 bits"),
    "no loss": (figures("mean_loss", float("nan")), "mean_loss = nan"),
    "a loss of 400 digits": (figures("mean_loss", 10**400), "mean_loss = a number of 1329 bits"),
    "modules of 400 digits": (figures("num_active", 10**400), "num_active = a number of 1329 bits"),
    "infinite memory": (figures("peak_bytes", float("inf")), "peak_bytes = inf"),
    "bytes of no message": (with_record("wire_up", MetricRecord({"forward\nround 3: done": 1})), "which is no kind of message"),
    "bytes of many messages": (with_record("wire_down", MetricRecord({f"kind{n}": 1 for n in range(33)})), "counts of 33 kinds"),
    "a first step of inf": (with_record("first_step", MetricRecord({"counted.head_flops": float("inf")})), "counted.head_flops = inf"),
    "half a first step": (with_record("first_step", MetricRecord({"counted.head_flops": 1})), "no 'counted.block_and_adapter_flops'"),
    "negative shape": (reshaped(-4, -7), "does not hold an adapter"),
    "huge shape": (reshaped(10**400, 7), "does not hold an adapter"),
    "no shape": (reshaped(), "does not hold an adapter"),
    "many dimensions": (reshaped(*[1] * 100, 4, 7), "does not hold an adapter"),
    "foreign numbers": (array("a/down", lambda one: Array("float64", (2, 7), one.stype, one.data)), "does not hold an adapter"),
    "a scaling of 400 digits": (config("scalings", [10**400, 2]), "does not hold an adapter"),
    "scalings of words": (config("scalings", ["two", "two"]), "does not hold an adapter"),
    "an empty list": (config("whole", []), "list index out of range"),
    "a junk record": (with_record("junk", ArrayRecord({"x": Array("uint8", (2**20,), "x", bytes(2**20))})), "a record 'junk'"),
    "a junk array": (array("b/down", lambda one: one), "an array 'b/down'"),
    "junk in an array": (array("a/up", lambda one: Array("float32", (2**18,), one.stype, bytes(2**20))), "'a/up' of 1048576 bytes"),
    "junk words": (config("junk", "x" * 2**20), "bytes beside its arrays"),
    "arrays for a receipt": (with_record("receipt", ArrayRecord({})), "without a receipt"),
    "arrays for figures": (with_record("metrics", ArrayRecord({})), "a record 'metrics'"),
    "silent": (lambda reply, before: [], "no answer before the round ended"),
}


def misbehaving(fault: Fault) -> Callable[[int, list[Message]], list[Message]]:
    """Honest in the first round."""
    kept: dict[int, Message] = {}

    def meddle(number: int, replies: list[Message]) -> list[Message]:
        found: list[Message] = []
        for reply in replies:
            bad = reply.metadata.src_node_id == BAD_NODE
            if bad:
                kept[number] = reply
            found += fault(reply, kept[number - 1]) if bad and number > 1 else [reply]
        return found

    return meddle


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_a_bad_answer_is_refused_by_name_and_the_others_make_the_round(name: str) -> None:
    fault, reason = FAULTS[name]
    expected, _ = federate([4, 2, 3], misbehaving(FAULTS["silent"][0]), max_norm=MAX_NORM)
    coordinator, told = federate([4, 2, 3], misbehaving(fault), max_norm=MAX_NORM)
    assert coordinator.state.digest() == expected.state.digest()
    ((number, edge, page),) = told.dropped
    assert (number, edge) == (2, BAD)
    assert reason in page
    assert name == "silent" or f"edge {BAD}" in page
    assert [[edge.edge for edge in one.edges] for one in told.rounds] == [["edge0", "edge1", "edge2"], ["edge0", "edge2"]]


def test_pages_say_what_came_what_was_expected_and_what_to_do() -> None:
    for name, (fault, _) in FAULTS.items():
        _, told = federate([4, 2, 3], misbehaving(fault), max_norm=MAX_NORM)
        page = told.dropped[0][2]
        assert name == "silent" or all(f"\n  {part}" in page for part in ("where", "got", "expected", "do")), page


def test_an_answer_of_a_node_that_was_not_asked_is_named_and_its_edge_is_silent() -> None:
    expected, _ = federate([4, 2, 3], misbehaving(FAULTS["silent"][0]))
    coordinator, told = federate([4, 2, 3], misbehaving(from_elsewhere))
    assert coordinator.state.digest() == expected.state.digest()
    (_, node, page), (_, edge, reason) = told.dropped
    assert (node, edge) == ("node 99", BAD)
    assert "was not asked" in page
    assert "no answer" in reason


def test_an_edge_that_is_late_is_refused() -> None:
    coordinator, told = federate([4, 2, 3], lambda _, replies: replies, lateness=late(BAD))
    expected, _ = federate([4, 2, 3], lambda _, replies: [reply for reply in replies if reply.metadata.src_node_id != BAD_NODE])
    assert coordinator.state.digest() == expected.state.digest()
    assert {(edge, "too late" in page) for _, edge, page in told.dropped} == {(BAD, True)}


def test_a_third_answer_does_not_bring_the_edge_back() -> None:
    _, told = federate([4, 2, 3], misbehaving(lambda reply, before: [reply, reply, reply]))
    assert [edge.edge for edge in told.rounds[-1].edges] == ["edge0", "edge2"]
    assert len(told.dropped) == 2


def test_a_forged_answer_does_not_take_the_place_of_the_edges_own() -> None:
    """It lacks the nonce, so that it is no second answer."""

    def forged(number: int, replies: list[Message]) -> list[Message]:
        other = copy.deepcopy(replies[0])
        other.metadata.__dict__["_src_node_id"] = BAD_NODE
        return [*replies, other] if number > 1 else replies

    _, told = federate([4, 2, 3], forged)
    assert [edge.edge for edge in told.rounds[-1].edges] == ["edge0", "edge1", "edge2"]
    assert [(edge, "another question" in page) for _, edge, page in told.dropped] == [(BAD, True)]


def test_too_few_good_answers_end_the_run_and_say_why() -> None:
    nan = FAULTS["NaN"][0]
    with pytest.raises(EdgesLostError, match="round 2 got too few updates") as caught:
        federate([4], lambda number, replies: replies if number == 1 else nan(replies[0], replies[0]))
    assert "edge0: NaN or infinity in a" in caught.value.got


RULES = [(rule, Robust()) for rule in ("exact-svd", "delta-svd", "stack", "zero-pad", "residual")] + [
    ("exact-svd", Robust("median")), ("exact-svd", Robust("trimmed-mean", 0.25)), ("exact-svd", Robust(clip="auto")),
    ("stack", Robust(clip=1.0)), ("exact-svd", Robust("median", clip=0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("aggregation", "robust"), RULES, ids=[f"{rule}-{one.combine}-{one.clip}" for rule, one in RULES])
@given(order=st.permutations(range(5)), other=st.permutations(range(5)))
@settings(max_examples=5, deadline=None)
def test_the_order_of_arrival_changes_no_bit(aggregation: str, robust: Robust, order: list[int], other: list[int]) -> None:
    """Sums that are dense at the end and such that are not; over two rounds, with the full weight of one module besides."""
    start = AdapterState("lora", START.modules, {"head": FullWeightDelta(torch.zeros(3, 5), torch.zeros(3))})

    def run(by: list[int]) -> tuple[str, list[str]]:
        coordinator, told = federate(
            [4, 2, 3, 1, 4], lambda _, replies: [replies[i] for i in by], start=start, aggregation=aggregation, robust=robust,
        )  # fmt: skip
        assert [edge for _, edge in told.finished[:5]] == [f"edge{i}" for i in by], "told as they come"
        return coordinator.state.digest(), [edge.edge for edge in told.rounds[-1].edges]

    assert run(order) == run(other)


def test_memory_holds_one_update_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    read, put = Spool.read, Spool.put

    def watched(spool: Spool, edge: str) -> Contribution:
        alive.append(sum(ref() is not None for ref in seen))
        found = read(spool, edge)
        seen.append(weakref.ref(found.state.modules["a"].up_OR))
        return found

    def watched_put(spool: Spool, contribution: Contribution) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        put(spool, contribution)
        seen.append(weakref.ref(contribution.state.modules["a"].up_OR))

    monkeypatch.setattr(Spool, "read", watched)
    monkeypatch.setattr(Spool, "put", watched_put)
    start = AdapterState("lora", {"a": START.modules["a"]})
    federate([4] * 40, lambda _, replies: replies, start=start, rounds=1)
    assert len(alive) == 80
    assert max(alive) <= 2, "the one that was counted last, while the next is read"


def test_the_question_is_the_same_in_every_rerun_and_another_for_everything_else() -> None:
    asks = [Ask("r", 1, "federated", "a"), Ask("r2", 1, "federated", "a"), Ask("r", 2, "federated", "a"), Ask("r", 1, "central", "a"),
            Ask("r", 1, "federated", "b"), Ask("", 1, "federated", "a")]  # fmt: skip
    assert len({ask.nonce for ask in asks}) == len(asks)
    assert Ask("r", 1, "federated", "a").nonce == asks[0].nonce


def test_an_edge_that_stays_away_is_not_waited_for_until_it_comes_back() -> None:
    waited: list[int] = []

    def away(number: int, replies: list[Message]) -> Iterable[Message]:
        bad = [reply for reply in replies if reply.metadata.src_node_id == BAD_NODE]
        # Away in rounds 2 to 5; in round 6 it is back, and the first to answer.
        if number == 6:
            yield from bad
        yield from (reply for reply in replies if reply.metadata.src_node_id != BAD_NODE)
        waited.append(number)
        if number in (1, 7):
            yield from bad

    coordinator, told = federate([2, 2, 2], away, rounds=7, patience=2)
    assert waited == [1, 2, 3, 7]
    assert [number for number, edge in told.finished if edge == BAD] == [1, 6, 7]
    assert [number for number, edge, _ in told.dropped if edge == BAD] == [2, 3, 4, 5]
    assert coordinator.state.is_finite()
