"""Training on a frozen part, and whole rounds of the rules that make one, against bases with merged weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atoll.adapters.attach import merge_into
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.config.checks.federation import rules_with
from atoll.errors import AdapterFitError
from atoll.seeding import stream as seed_of
from atoll.selection.schedule import Schedule
from atoll.split.cut import Cut
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, Trainer, TrainState, Update

from tests.adapters.test_frozen_delta import frozen_state
from tests.conftest import random_model
from tests.federated.test_rounds import STEPS, run
from tests.pieces import adapters, selector, stream, trainer
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

RULES = ("exact-svd", "delta-svd", "stack", "zero-pad", "residual")


def fit(engine: Trainer, state: TrainState, steps: int = STEPS, checkpointing: bool = False, edge: str = "north") -> Update:
    return engine.fit(state, stream(edge), FitPlan(steps, 1, checkpointing), lambda _report: None)


def on_merged(engine: LocalTrainer, frozen_delta: AdapterState) -> LocalTrainer:
    """The same trainer, its base with this change in its weights."""
    merge_into(engine.base.model, frozen_delta)
    return engine


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_it_is_training_the_model_with_merged_weights(family: str, checkpointing: bool) -> None:
    engine = trainer(family)
    start, frozen_delta = adapters(engine.base.model), frozen_state(engine.base.model)
    before = engine.base.digest()
    ours = fit(engine, TrainState(start, {}, 0, frozen_delta=frozen_delta), checkpointing=checkpointing)
    theirs = fit(on_merged(trainer(family), frozen_delta), TrainState(start, {}, 0), checkpointing=checkpointing)
    assert [report.loss for report in ours.reports] == pytest.approx([report.loss for report in theirs.reports], rel=1e-4)
    # Adam moves a number whose gradient is nearly zero by its sign, so that some few differ.
    for name, one in theirs.state.adapter.modules.items():
        assert (ours.state.adapter.modules[name].up_OR - one.up_OR).norm() < 0.01 * one.up_OR.norm()
    assert ours.state.frozen_delta is frozen_delta
    assert engine.base.digest() == before


def test_stopping_and_going_on_on_it_gives_the_same_bits() -> None:
    engine = trainer()
    start = TrainState(adapters(engine.base.model), {}, 0, frozen_delta=frozen_state(engine.base.model))
    whole = fit(engine, start, 4)
    half = fit(engine, start, 2)
    assert fit(engine, half.state, 2).state.adapter.digest() == whole.state.adapter.digest()


def test_an_edge_whose_blocks_run_in_a_host_refuses_it() -> None:
    model = random_model("llama", BLOCKS)
    engine, _ = device_trainer("llama", Cut(1, 0), thread_host(served(model)))
    with pytest.raises(AdapterFitError, match="runs in a host"):
        fit(engine, TrainState(adapters(model), {}, 0, frozen_delta=frozen_state(model)))


def edges() -> dict[str, Trainer]:
    return {"north": trainer(), "south": trainer(edge="south")}


@pytest.mark.parametrize("rule", RULES)
def test_edges_of_unequal_rank_make_one_adapter_by_every_rule(rule: str) -> None:
    state, told = run(edges(), {"north": 4, "south": 2}, rounds=3, aggregation=rule)
    again, _ = run(edges(), {"north": 4, "south": 2}, rounds=3, aggregation=rule)
    assert state.digest() == again.digest() == told.rounds[-1].state.digest()
    assert all(one.up_OR.abs().max() > 0 and one.rank <= min(one.size) for one in state.modules.values())
    assert (told.rounds[0].discarded_share > 0) == (rule not in rules_with("keeps_frozen_delta"))
    first, second = ([edge for edge in told.edges if edge.edge == name] for name in ("north", "south"))
    frozen_delta_travels = rule in rules_with("keeps_frozen_delta")
    for edge in (first, second):
        assert (edge[1].down_bytes > edge[0].down_bytes) == frozen_delta_travels
        assert edge[1].up_bytes == edge[2].up_bytes, "the frozen delta does not come back"


@pytest.mark.parametrize("rule", RULES)
def test_edges_may_train_different_modules_and_what_none_trains_stays(rule: str) -> None:
    ranks, parts = {"north": 4, "south": 2}, {"north": slice(0, 3), "south": slice(2, 5)}
    state, told = run(edges(), ranks, aggregation=rule, parts=parts)
    assert not told.dropped
    start = adapters(random_model("llama"))
    for number, (name, one) in enumerate(start.modules.items()):
        assert torch.equal(state.modules[name].delta_OI(), one.delta_OI()) == (number >= 5)
        if number >= 5:
            assert torch.equal(state.modules[name].down_RI, one.down_RI)
    if rule not in rules_with("keeps_frozen_delta"):
        assert list(state.ranks.values())[:5] == [4, 4, 4, 2, 2], "the largest rank of those that train it"


@pytest.mark.parametrize("rule", ["zero-pad", "residual"])
def test_one_edge_equals_plain_local_training_bit_for_bit(rule: str) -> None:
    federated, told = run({"north": trainer()}, {"north": 4}, aggregation=rule)
    engine = trainer()
    plain = fit(engine, TrainState(adapters(engine.base.model), {}, 0), 2 * STEPS)
    assert federated.digest() == plain.state.adapter.digest()
    assert [edge.discarded_share for edge in told.rounds] == [0, 0]


def dense_sum(parts: list[tuple[AdapterState, float]]) -> AdapterState:
    """Of weighted changes, written out: the product beside an identity."""
    modules = {}
    for name, one in parts[0][0].modules.items():
        delta_OI = torch.stack([state.modules[name].delta_OI() * share for state, share in parts]).sum(0)
        modules[name] = ModuleAdapter(torch.eye(one.size[0]), delta_OI.float(), 1.0)
    return AdapterState("lora", modules)


def averaged_apart(states: list[AdapterState]) -> AdapterState:
    modules = {}
    for name, one in states[0].modules.items():
        downs, ups = ([getattr(state.modules[name], matrix) for state in states] for matrix in ("down_RI", "up_OR"))
        modules[name] = ModuleAdapter(torch.stack(downs).mean(0), torch.stack(ups).mean(0), one.scaling)
    return AdapterState("lora", modules)


def by_hand(rule: str, rounds: int) -> AdapterState:
    """Two edges of equal rank and as many rows, each on a base into which the frozen delta is merged; the dense sum in the end."""
    start = adapters(random_model("llama"))
    common, frozen_delta = start, AdapterState("lora", {})
    for round_number in range(1, rounds + 1):
        sent = []
        for edge in ("north", "south"):
            engine = on_merged(trainer(edge=edge), frozen_delta)
            sent.append(fit(engine, TrainState(common, {}, (round_number - 1) * STEPS), edge=edge).state.adapter)
        mean = [(state, 0.5) for state in sent]
        if rule == "residual":
            common = averaged_apart(sent)
            mean.append((common, -1.0))
        else:
            sizes, seed = {name: one.size for name, one in start.modules.items()}, seed_of(0, "stack", round=round_number)
            common = fresh_adapters("lora", sizes, start.ranks, 8, seed)
        frozen_delta = dense_sum([*([(frozen_delta, 1.0)] if frozen_delta.modules else []), *mean][::-1])
    return dense_sum([(frozen_delta, 1.0), (common, 1.0)])


@pytest.mark.parametrize("rule", rules_with("keeps_frozen_delta"))
def test_rounds_are_those_written_out_with_merged_weights(rule: str) -> None:
    """Forgetting the optimizer, which is how adapters that start anew are trained."""
    ours, _ = run(edges(), {"north": 4, "south": 4}, rounds=3, keep=False, aggregation=rule)
    theirs = by_hand(rule, 3)
    for name, one in theirs.modules.items():
        expected = one.delta_OI()
        assert (ours.modules[name].delta_OI() - expected).norm() < 0.01 * expected.norm(), name


def test_training_under_every_rule_lowers_the_loss() -> None:
    for rule in RULES:
        _, told = run(edges(), {"north": 4, "south": 2}, rounds=4, aggregation=rule, keep=rule != "stack")
        losses = [sum(edge.mean_loss for edge in round.edges) for round in told.rounds]
        assert losses[-1] < losses[0], rule


def test_an_edge_that_trains_some_modules_only_still_evaluates_all_of_the_frozen_delta() -> None:
    """What edges learned of a module that this one does not train is part of its base."""
    engine = trainer()
    start, frozen_delta = adapters(engine.base.model), frozen_state(engine.base.model)
    some = AdapterState("lora", dict(list(start.modules.items())[:3]))
    ours = fit(engine, TrainState(some, {}, 0, frozen_delta=frozen_delta))
    theirs = fit(on_merged(trainer(), frozen_delta), TrainState(some, {}, 0))
    assert [report.loss for report in ours.reports] == pytest.approx([report.loss for report in theirs.reports], rel=1e-4)
    without = fit(trainer(), TrainState(some, {}, 0))
    assert abs(without.reports[0].loss - ours.reports[0].loss) > 1e-3


@pytest.mark.parametrize("killed", ["offload", "skip", "merge"])
@pytest.mark.parametrize("rule", rules_with("keeps_frozen_delta"))
def test_modules_are_killed_and_revived_on_top_of_it(rule: str, killed: str) -> None:
    """A window begins in one round and ends in the next; what was not trained in a round is no vote."""

    def choosing() -> dict[str, Trainer]:
        start = adapters(random_model("llama"))
        schedule = Schedule(2, 8, ever=True)
        return {
            name: replace(engine, selector=selector(start, schedule, policy="kill-and-revive", keep=0.2, killed=killed))
            for name, engine in (("north", trainer()), ("south", trainer(edge="south")))
        }

    ranks = {"north": 4, "south": 4}
    state, told = run(choosing(), ranks, rounds=4, keep=False, aggregation=rule)
    again, _ = run(choosing(), ranks, rounds=4, keep=False, aggregation=rule)
    assert state.digest() == again.digest()
    assert not told.dropped
    sent = [edge.up_bytes for edge in told.edges if edge.edge == "north"]
    assert sent[1] < min(sent[2:]), "a choice holds for all of the second round, and a window begins at the end of the third"
