"""Full fine-tuning: the step against torch's AdamW on the weights themselves, and rounds against averaging weights by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from atoll.adapters.attach import merge_into
from atoll.adapters.fresh import fresh_adapters, fresh_full_weights
from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.places import module_size
from atoll.adapters.state import AdapterState
from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.cost.work import Work
from atoll.errors import AdapterFitError, UpdateRefusedError
from atoll.federated.aggregation.aggregate import Aggregator, Common, joined, started
from atoll.federated.aggregation.spool import Contribution
from atoll.federated.checks import check_update
from atoll.federated.client import EdgeWork, client_app
from atoll.federated.flower import Context, RecordDict
from atoll.federated.grid import InProcessGrid
from atoll.federated.payload import get_adapter, put_adapter
from atoll.federated.strategy import AdapterStrategy
from atoll.training.local_trainer import LocalTrainer
from atoll.training.step import learning_rate_at
from atoll.training.trainer import FitPlan, TrainState, Update

from tests.conftest import random_model
from tests.federated.test_rounds import Told
from tests.pieces import stream, trainer

STEPS = 5


def whole(family: str = "llama") -> AdapterState:
    """No change yet, of every projection."""
    model = random_model(family)
    names = [name for name, module in model.named_modules() if module_size(module) and module is not model.get_output_embeddings()]
    return fresh_full_weights({name: module_size(model.get_submodule(name)) or (0, 0) for name in names}, names)


def fit(engine: LocalTrainer, steps: int = STEPS, state: TrainState | None = None, *, edge: str = "north", again: bool = False) -> Update:
    return engine.fit(state or TrainState(whole(engine.base.name), {}, 0), stream(edge), FitPlan(steps, 1, again), lambda _: None)


def test_steps_equal_torchs_adamw_on_the_weights(family: str) -> None:
    """In fp64, so that nothing hides in rounding; with clipping, warm-up and schedule."""
    engine = trainer(family, warmup_steps=2, grad_clip=0.5)
    ours = fit(engine).state.adapter
    model = random_model(family).double()
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in ours.full_weights}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        batch = stream().batch(step)
        labels = torch.full(batch.input_ids_BT.shape, -100).flatten()
        labels[batch.predict_N + 1] = batch.target_N
        model(input_ids=batch.input_ids_BT, labels=labels.view_as(batch.input_ids_BT)).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate_at(engine.train, step, 6)
        optimizer.step()
        optimizer.zero_grad()
    gaps, moved = [], []
    for name, change in ours.full_weights.items():
        theirs = weights[name].detach() - before[name]
        gaps.append((change.change_OI.double() - (theirs.T if family == "gpt2" else theirs)).abs())
        moved.append(theirs.abs().max())
    # Adam moves a number whose gradient is mere rounding by a full step in either direction: those few are let off.
    gap = torch.cat([one.flatten() for one in gaps])
    assert float(gap.quantile(0.99)) < 1e-6
    assert float((gap > 1e-5).double().mean()) < 1e-3
    assert min(moved) > 1e-3


def test_training_lowers_the_loss_and_leaves_the_base_alone(family: str) -> None:
    engine = trainer(family, total_steps=20)
    before = engine.base.digest()
    update = fit(engine, 20)
    assert update.reports[-1].loss < update.reports[0].loss
    assert engine.base.digest() == before
    assert update.trained == set(whole(family).full_weights)


def test_stopping_and_going_on_gives_the_same_bits_and_so_does_checkpointing() -> None:
    engine = trainer()
    all_at_once, half = fit(engine, 6), fit(engine, 3)
    assert fit(engine, 3, half.state).state.adapter.digest() == all_at_once.state.adapter.digest()
    assert fit(engine, 6, again=True).state.adapter.digest() == all_at_once.state.adapter.digest()


def test_bf16_arithmetic_trains_weights_in_fp32() -> None:
    engine = trainer(total_steps=20)
    engine.base.model.to(torch.bfloat16)
    update = fit(engine, 20)
    assert all(change.change_OI.dtype == torch.float32 for change in update.state.adapter.full_weights.values())
    assert update.reports[-1].loss < update.reports[0].loss


def test_two_edges_equal_averaging_the_weights_by_hand() -> None:
    """Each edge trains a copy of the model, and the copies' weights are averaged by rows; twice."""
    told, start = Told(), whole()
    examples, contexts = {"north": 12, "south": 4}, {}
    works = {
        name: EdgeWork(name, trainer(edge=name), stream(name), rows, FitPlan(2, 1, False), False, lambda _: Work(), lambda *_: None)
        for name, rows in examples.items()
    }
    nodes = {1: "north", 2: "south"}
    contexts = {node: Context(1, node, {"edge": name}, RecordDict(), {}) for node, name in nodes.items()}
    strategy = AdapterStrategy(start, dict.fromkeys(examples, start.ranks), nodes, 1, told.observer)
    strategy.start(InProcessGrid(client_app(lambda context: works[str(context.node_config["edge"])]), contexts), strategy.arrays(), 2)
    common = random_model("llama")
    for number in range(2):
        weights: dict[str, torch.Tensor] = {}
        for name, rows in examples.items():
            base = Base("llama", copy.deepcopy(common), None, False)  # type: ignore[arg-type]
            engine = LocalTrainer(base, Train(learning_rate=1e-2), 6, 0.0, 0, name)
            trained = fit(engine, 2, TrainState(start, {}, 2 * number), edge=name).state.adapter
            merge_into(base.model, trained)
            for module in start.full_weights:
                part = base.model.get_submodule(module).weight.double() * rows / 16
                weights[module] = weights.get(module, torch.zeros_like(part)) + part
        for module, weight in weights.items():
            common.get_submodule(module).weight.data.copy_(weight)
    merged = random_model("llama")
    merge_into(merged, strategy.state)
    for module in start.full_weights:
        torch.testing.assert_close(merged.get_submodule(module).weight, common.get_submodule(module).weight, rtol=1e-5, atol=2e-5)
    assert told.rounds[-1].discarded_share == 0.0
    numbers = 4 * start.num_parameters
    assert all(numbers < edge.up_bytes < numbers + 10_000 for edge in told.edges), "only the changes travel"


def test_one_edge_equals_plain_training_bit_for_bit() -> None:
    told, start = Told(), whole()
    work = EdgeWork("north", trainer(), stream(), 12, FitPlan(3, 1, False), True, lambda _: Work(), lambda *_: None)
    strategy = AdapterStrategy(start, {"north": start.ranks}, {1: "north"}, 1, told.observer)
    grid = InProcessGrid(client_app(lambda _: work), {1: Context(1, 1, {"edge": "north"}, RecordDict(), {})})
    strategy.start(grid, strategy.arrays(), 2)
    assert strategy.state.digest() == fit(trainer(), 6).state.adapter.digest()


def mixed(seed: int) -> AdapterState:
    """An adapter of one module beside the full weight and bias of another, as a classifier has them."""
    g = torch.Generator().manual_seed(seed)
    pairs = fresh_adapters("lora", {"a": (6, 4)}, {"a": 2}, 4.0, seed)
    return AdapterState("lora", pairs.modules, {"head": FullWeightDelta(torch.randn(3, 6, generator=g), torch.randn(3, generator=g))})


@pytest.mark.parametrize("rule", ["exact-svd", "delta-svd", "stack", "zero-pad", "residual"])
def test_every_rule_averages_whole_weights_exactly(rule: str) -> None:
    start, parts = mixed(0), [mixed(1), mixed(2), mixed(3)]
    common = started(start, rule, 0)  # type: ignore[arg-type]
    aggregator = Aggregator(rule, common, {"a": 2})  # type: ignore[arg-type]
    for number, part in enumerate(parts):
        aggregator.add(Contribution(f"e{number}", part, number + 1), start)
    assert aggregator.num_held >= 21
    head = joined(aggregator.finish().common).full_weights["head"]
    for number, tensor in enumerate(head.tensors):
        by_hand = sum((n + 1) / 6 * part.full_weights["head"].tensors[number].double() for n, part in enumerate(parts))
        torch.testing.assert_close(tensor.double(), by_hand, rtol=1e-6, atol=1e-6)


def test_whole_weights_travel_bit_for_bit() -> None:
    record, state = RecordDict(), mixed(5)
    put_adapter(record, state)
    assert get_adapter(record).digest() == state.digest()
    del record.array_records["adapter"]["head/change"]
    with pytest.raises(UpdateRefusedError, match="does not hold an adapter"):
        get_adapter(record)


def test_an_update_of_other_weights_is_refused() -> None:
    reference, good = mixed(0), mixed(1)
    check_update(Contribution("north", good, 1), reference)
    bad = [
        AdapterState("lora", good.modules, {"other": good.full_weights["head"]}),
        AdapterState("lora", good.modules, {"head": FullWeightDelta(torch.zeros(3, 7), torch.zeros(3))}),
        AdapterState("lora", good.modules, {"head": FullWeightDelta(torch.zeros(3, 6))}),
    ]
    for state in bad:
        with pytest.raises(AdapterFitError, match="what the edges share"):
            check_update(Contribution("north", state, 1), reference)
    nan = AdapterState("lora", {}, {"head": FullWeightDelta(torch.full((3, 6), torch.nan), torch.zeros(3))})
    with pytest.raises(UpdateRefusedError, match="not finite"):
        check_update(Contribution("north", nan, 1), reference)


def test_common_state_used_in_a_round_keeps_what_no_edge_sent() -> None:
    aggregator = Aggregator("exact-svd", Common(mixed(0)), {"a": 2})
    aggregator.add(Contribution("north", AdapterState("lora", mixed(1).modules), 1), mixed(0))
    assert torch.equal(aggregator.finish().common.trained.full_weights["head"].change_OI, mixed(0).full_weights["head"].change_OI)
