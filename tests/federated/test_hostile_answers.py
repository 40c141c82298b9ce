"""Whatever one edge answers, the round ends as if it had answered well or not at all, and what is sent on is finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.base.load import load_base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Data, Evaluate, Train
from atoll.embedded import tiny_path
from atoll.errors import EdgesLostError, UpdateRefusedError
from atoll.federated import strategy as strategy_module
from atoll.federated.aggregation.aggregate import Aggregate, Common, aggregate
from atoll.federated.aggregation.norms import LARGEST_NORM, factor_norm, product_norm
from atoll.federated.aggregation.robust import Robust
from atoll.federated.aggregation.spool import Contribution, Spool
from atoll.federated.figures import LARGEST, finite_number, whole_number
from atoll.federated.flower import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from atoll.federated.payload import RAW, get_adapter, put_adapter
from atoll.tasks.batches import BatchStream
from atoll.tasks.evaluate import evaluate
from atoll.tasks.rows import load_rows
from atoll.tasks.text import text_form
from atoll.tasks.tokens import pad_id, tokenize
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState

from tests.federated.meddling import START, Meddle, federate

BAD, BAD_NODE = "edge1", 2
RANKS = [4, 2, 3]
NAMES = st.sampled_from([
    "receipt", "adapter", "adapter_config", "metrics", "uploaded", "first_step", "wire_up", "wire_down", "frozen_delta", "ask", "other",
])  # fmt: skip
KEYS = st.one_of(
    st.text(max_size=8),
    st.sampled_from([
        "a/down", "a/up", "wide/down", "kind", "modules", "scalings", "whole", "edge", "nonce", "round", "base", "num_examples",
        "mean_loss", "flops.block_flops", "num_active", "bytes", "forward", "counted.head_flops", "formula.block_flops",
    ]),
)  # fmt: skip
WHOLE = st.one_of(st.integers(), st.sampled_from([10**400, -(10**400), 2**63, 2**80 + 1]))
FLOATS = st.floats()
METRICS = st.one_of(WHOLE, FLOATS, st.lists(WHOLE, max_size=3), st.lists(FLOATS, max_size=3))
CONFIGS = st.one_of(
    METRICS, st.text(max_size=8), st.booleans(), st.binary(max_size=8), st.lists(st.text(max_size=8), max_size=3),
    st.lists(st.sampled_from(["a", "wide", "b"]), max_size=3),
)  # fmt: skip
ARRAYS = st.builds(
    lambda dtype, shape, stype, data: Array(dtype, tuple(shape), stype, data),
    st.sampled_from(["float32", "float16", "bfloat16", "int64", ""]),
    st.lists(st.one_of(st.integers(-4, 12), st.sampled_from([2**63, 10**400])), max_size=4), st.sampled_from([RAW, "numpy.ndarray", ""]),
    st.binary(max_size=300),
)  # fmt: skip
RECORDS = st.one_of(
    st.dictionaries(KEYS, METRICS, max_size=4).map(MetricRecord), st.dictionaries(KEYS, CONFIGS, max_size=4).map(ConfigRecord),
    st.dictionaries(KEYS, ARRAYS, max_size=4).map(ArrayRecord),
)  # fmt: skip
CHANGES = st.dictionaries(NAMES, st.one_of(st.none(), RECORDS, st.dictionaries(KEYS, st.one_of(METRICS, CONFIGS), min_size=1, max_size=2)))


def answering(change: Callable[[Message], None]) -> Meddle:
    """The bad edge's answers are changed, from the first round on."""

    def meddle(number: int, replies: list[Message]) -> list[Message]:
        for reply in replies:
            if reply.metadata.src_node_id == BAD_NODE:
                change(reply)
        return replies

    return meddle


def silent(number: int, replies: list[Message]) -> list[Message]:
    return [reply for reply in replies if reply.metadata.src_node_id != BAD_NODE]


WITHOUT = federate(RANKS, silent, rounds=1)[0].state.digest()
"""The common adapter where the bad edge says nothing."""


@settings(max_examples=300, deadline=None)
@given(CHANGES)
def test_no_record_ends_a_run(changes: Mapping[str, object]) -> None:
    """Records are taken away, replaced, or given other values for some keys."""

    def change(reply: Message) -> None:
        for name, made in changes.items():
            old = reply.content.get(name)
            if made is None:
                reply.content.pop(name, None)
            elif not isinstance(made, dict):
                reply.content[name] = made  # type: ignore[assignment]
            elif old is not None and not isinstance(old, ArrayRecord):
                try:
                    reply.content[name] = type(old)({**old, **made})
                except TypeError:  # No such value in a record of this type.
                    reply.content[name] = ConfigRecord({key: str(value) for key, value in made.items()})

    coordinator, told = federate(RANKS, answering(change), rounds=1)
    counted = [edge.edge for edge in told.rounds[0].edges]
    assert coordinator.state.is_finite()
    assert BAD in counted or coordinator.state.digest() == WITHOUT
    assert counted in (["edge0", "edge1", "edge2"], ["edge0", "edge2"])
    assert [edge for _, edge, _ in told.dropped] == ([] if BAD in counted else [BAD])
    assert all(math.isfinite(edge.mean_loss) and 0 <= edge.work.flops.flops < 4 * LARGEST for edge in told.rounds[0].edges)
    assert all(page.replace("\n", "").isprintable() and len(page) < 2000 for _, _, page in told.dropped)


@settings(deadline=None)
@given(st.one_of(METRICS, CONFIGS))
def test_a_figure_is_a_bounded_number_or_refused(value: object) -> None:
    for read in (whole_number, finite_number):
        found, refusal = None, ""
        try:
            found = read({"key": value}, "key")
        except ValueError as problem:
            refusal = str(problem)
        if found is None:
            assert refusal.startswith("key = ")
            assert len(refusal) < 400
        else:
            assert found == value
            assert math.isfinite(found)
            assert abs(found) <= LARGEST


def as_large_as(norm: float, one: ModuleAdapter) -> ModuleAdapter:
    """Its product, with all of it in one direction."""
    down_RI, up_OR = torch.zeros_like(one.down_RI), torch.zeros_like(one.up_OR)
    down_RI[0], up_OR[:, 0] = 1, 1
    times = math.sqrt(norm / product_norm(ModuleAdapter(down_RI, up_OR, one.scaling), "lora"))
    return ModuleAdapter(times * down_RI, times * up_OR, one.scaling)


def moved_by(factor: float) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        state = get_adapter(reply.content)
        put_adapter(reply.content, AdapterState(state.kind, {name: as_large_as(factor, one) for name, one in state.modules.items()}))

    return change


def test_by_default_an_update_is_refused_that_could_spoil_the_others_training() -> None:
    for norm, counts in ((0.99 * LARGEST_NORM, True), (1.01 * LARGEST_NORM, False), (1e30, False)):
        coordinator, told = federate(RANKS, answering(moved_by(norm)), rounds=1)
        assert [BAD in [edge.edge for edge in one.edges] for one in told.rounds] == [counts]
        assert coordinator.state.digest() == WITHOUT or counts
        assert all("a norm of" in page and "at most 1000" in page for _, _, page in told.dropped)


def test_who_means_it_may_set_another_limit() -> None:
    _, told = federate(RANKS, answering(moved_by(5e3)), rounds=1, max_norm=1e4)
    assert not told.dropped
    _, told = federate(RANKS, answering(moved_by(5.0)), rounds=1, max_norm=4.0)
    assert [edge for _, edge, _ in told.dropped if edge == BAD] == [BAD]


def far(number: int, replies: list[Message]) -> list[Message]:
    """Two edges share a large product between them, and no more of it than is allowed."""
    for reply in replies[:2]:
        state = get_adapter(reply.content)
        modules = dict(state.modules)
        one = modules["a"]
        down_RI, up_OR = torch.zeros_like(one.down_RI), torch.zeros_like(one.up_OR)
        (down_RI if reply is replies[0] else up_OR.T)[0] = 0.9 * LARGEST_NORM / 10
        put_adapter(reply.content, AdapterState(state.kind, {**modules, "a": ModuleAdapter(down_RI, up_OR, one.scaling)}))
    return replies


def test_updates_that_are_large_only_together_are_found_in_their_sum() -> None:
    coordinator, told = federate([4] * 5, far, rounds=1, aggregation="zero-pad")
    assert {edge for _, edge, _ in told.dropped} <= {"edge0", "edge1"}
    assert told.dropped
    assert "no edge can go on from" in told.dropped[0][2]
    assert max(product_norm(one, "lora") for one in coordinator.state.modules.values()) <= LARGEST_NORM
    assert {"edge2", "edge3", "edge4"} <= {edge.edge for edge in told.rounds[0].edges}


def spoiled_by(edge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that cannot count what this edge sends."""

    def spoiled(spool: Spool, *arguments: object, **options: object) -> Aggregate:
        if edge in spool.edges:
            raise UpdateRefusedError("the updates of a round come to numbers that are not finite", got="NaN or infinity")
        return aggregate(spool, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(strategy_module, "aggregate", spoiled)


def test_a_sum_that_is_not_finite_goes_on_without_the_update_that_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled_by(BAD, monkeypatch)
    coordinator, told = federate(RANKS, answering(moved_by(900.0)), rounds=1)
    assert coordinator.state.digest() == WITHOUT
    assert [edge for _, edge, _ in told.dropped] == [BAD]
    with pytest.raises(EdgesLostError, match="too few updates"):
        federate(RANKS, answering(moved_by(900.0)), rounds=1, enough=3)


def test_a_sum_that_is_not_finite_and_nobodys_fault_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled_by(BAD, monkeypatch)
    with pytest.raises(UpdateRefusedError, match="not finite") as caught:
        federate(RANKS, lambda _, replies: replies, rounds=1)
    assert caught.value.exit_status == 4


def test_what_is_not_finite_never_becomes_the_common_adapter() -> None:
    """Whatever the rule, also by the median."""
    for rule, robust in (("exact-svd", Robust()), ("zero-pad", Robust()), ("stack", Robust()), ("exact-svd", Robust("median"))):
        with Spool() as spool:
            for edge in ("north", "south", "west"):
                one = START.modules["a"]
                state = AdapterState("lora", {"a": ModuleAdapter(one.down_RI, torch.full_like(one.up_OR, math.inf), one.scaling)})
                spool.put(Contribution(edge, state, 1))
            with pytest.raises(UpdateRefusedError, match="not finite"):
                aggregate(spool, rule, Common(START), START.ranks, lambda edge: START, robust=robust)


@pytest.mark.parametrize("side", ["product", "factors"])
def test_at_the_largest_norm_others_can_still_train_and_be_evaluated(side: str) -> None:
    """Every module at once, in the direction that adds up most; ten times as far, gradients are NaN."""
    base, shapes = load_base("tiny"), read_shapes(str(tiny_path()))
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    start = fresh_adapters("lora", sizes, dict.fromkeys(sizes, 4), 8.0, 0)
    modules = {name: as_large_as(LARGEST_NORM, one) for name, one in start.modules.items()}
    if side == "factors":
        for name, one in modules.items():
            times = LARGEST_NORM / factor_norm(one)
            modules[name] = ModuleAdapter(one.down_RI / times, one.up_OR * times, one.scaling)
    state = AdapterState("lora", modules)
    rows = load_rows("demo", base_dir=Path(), limit=8, on_bad_row="error")
    form = text_form(Data(prompt="{mr} ->", completion=" {ref}"), rows.columns)
    with attached(base.model, state):
        assert math.isfinite(evaluate(base, rows, form, Evaluate(batch_size=8), max_length=64)["loss"])
    batches = BatchStream(tokenize(rows, form, base.tokenizer, 64), 4, 0, "north", "bucket", pad_id(base.tokenizer))
    trainer = LocalTrainer(base, Train(learning_rate=1e-3), 2, 0.0, 0, "north")
    update = trainer.fit(TrainState(state, {}, 0), batches, FitPlan(2, 1, False), lambda report: None)
    assert update.state.adapter.is_finite()
    assert math.isfinite(update.mean_loss)
