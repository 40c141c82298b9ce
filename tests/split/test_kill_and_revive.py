"""Kill-and-Revive through a host is Kill-and-Revive with the whole base: the same sets, the same adapters."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.base.load import Base, load_base
from atoll.config.schema import Train
from atoll.selection.schedule import Schedule
from atoll.split.cut import Cut
from atoll.split.host.blocks.middle import KilledModule, Middle
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState

from tests.conftest import random_model, save_model_folder
from tests.pieces import HOW_KILLED, Steps, adapters, selector, stream
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host
from tests.split.test_split_equals_local import CUTS, difference

STEPS = 20
PLAN, SCHEDULE = FitPlan(STEPS, 1, False), Schedule(3, 8, ever=True)


@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("kind", "killed"), HOW_KILLED)
def test_split_equals_local(kind: str, killed: str, cut: str, mode: str) -> None:
    start = adapters(random_model("llama", BLOCKS), kind)
    choosing = selector(start, SCHEDULE, front=CUTS[cut].front, policy="kill-and-revive", keep=0.15, killed=killed, variation="change")
    base = Base("llama", random_model("llama", BLOCKS), None, False)  # type: ignore[arg-type]
    local = LocalTrainer(base, Train(learning_rate=2e-3), STEPS, 0.0, 0, "north", selector=choosing)
    wanted = local.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    trainer, client = device_trainer("llama", CUTS[cut], thread_host(served(random_model("llama", BLOCKS))), kind=kind, mode=mode)
    update = replace(trainer, selector=choosing).fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    assert [report.active for report in update.reports] == [report.active for report in wanted.reports]
    assert difference(wanted.state.adapter, update.state.adapter) < 1e-5
    assert len({report.active for report in update.reports}) > 2
    assert (client.account.sent["killed"] > 0) == (killed != "skip")


def test_a_lottery_falls_alike_through_a_host() -> None:
    start = adapters(random_model("llama", BLOCKS))
    choosing = selector(start, SCHEDULE, front=1, policy="kill-and-revive", keep=0.15, draw="lottery")
    base = Base("llama", random_model("llama", BLOCKS), None, False)  # type: ignore[arg-type]
    local = LocalTrainer(base, Train(learning_rate=2e-3), STEPS, 0.0, 0, "north", selector=choosing)
    wanted = local.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    trainer, _ = device_trainer("llama", CUTS["1-0"], thread_host(served(random_model("llama", BLOCKS))))
    update = replace(trainer, selector=choosing).fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    assert [report.active for report in update.reports] == [report.active for report in wanted.reports]
    assert len({report.active for report in update.reports}) == 4, "the whole pool, and three draws"
    assert difference(wanted.state.adapter, update.state.adapter) < 1e-5


def test_in_every_family(family: str) -> None:
    start, few = adapters(random_model(family, BLOCKS)), FitPlan(9, 1, False)
    choosing = selector(start, Schedule(2, 5, ever=True), front=1, policy="kill-and-revive", keep=0.2)
    base = Base(family, random_model(family, BLOCKS), None, family == "gpt2")  # type: ignore[arg-type]
    local = LocalTrainer(base, Train(learning_rate=2e-3), STEPS, 0.0, 0, "north", selector=choosing)
    wanted = local.fit(TrainState(start, {}, 0), stream(), few, Steps([]))
    trainer, client = device_trainer(family, CUTS["1-0"], thread_host(served(random_model(family, BLOCKS))), mode="factored")
    update = replace(trainer, selector=choosing).fit(TrainState(start, {}, 0), stream(), few, Steps([]))
    assert [report.active for report in update.reports] == [report.active for report in wanted.reports]
    assert difference(wanted.state.adapter, update.state.adapter) < 1e-5
    assert client.account.sent["killed"] > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_on_a_quantized_base(bits: int, tmp_path: Path) -> None:
    save_model_folder(tmp_path, "llama")
    start = adapters(random_model("llama"))
    choosing = selector(start, SCHEDULE, policy="kill-and-revive", keep=0.2, variation="change")
    whole = LocalTrainer(load_base(str(tmp_path), bits=bits), Train(learning_rate=2e-3), STEPS, 0.0, 0, "north", selector=choosing)
    wanted = whole.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    host = served(load_base(str(tmp_path), bits=bits).model)
    trainer, _ = device_trainer(load_base(str(tmp_path)).model, CUTS["0-0"], thread_host(host))
    update = replace(trainer, selector=choosing).fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    if bits == 4:  # In 8 bit the library's fp16 rounding may turn a close choice.
        assert [report.active for report in update.reports] == [report.active for report in wanted.reports]
    assert difference(wanted.state.adapter, update.state.adapter) < (0.1 if bits == 8 else 1e-5)
    assert difference(start, update.state.adapter) > 1e-2


@pytest.mark.parametrize("codec", ["bf16", "int8"])
@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
def test_with_a_lossy_codec(codec: str, mode: str) -> None:
    start = adapters(random_model("llama", BLOCKS))
    choosing = selector(start, Schedule(0, None, ever=True), policy="last-layers", keep=0.2)
    updates = []
    for name in ("fp32", codec):
        trainer, _ = device_trainer("llama", CUTS["1-0"], thread_host(served(random_model("llama", BLOCKS))), mode=mode, codec=name)
        updates.append(replace(trainer, selector=choosing).fit(TrainState(start, {}, 0), stream(), PLAN, Steps([])))
    assert 1e-7 < difference(updates[0].state.adapter, updates[1].state.adapter) < 0.2


def test_killed_modules_cross_in_full_precision_and_groups_without_active_ones_not_at_all() -> None:
    start = adapters(random_model("llama", BLOCKS))
    bytes_by_keep = {}
    for keep in (0.05, 1.0):
        choosing = selector(start, Schedule(1, None, ever=True), policy="early-kill", keep=keep)
        trainer, client = device_trainer("llama", Cut(0, 0), thread_host(served(random_model("llama", BLOCKS))), codec="int8")
        replace(trainer, selector=choosing).fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
        bytes_by_keep[keep] = client.account
    killed = start.num_parameters - start.modules[next(iter(start.modules))].num_parameters
    assert bytes_by_keep[1.0].sent["killed"] == 0
    assert 4 * killed <= bytes_by_keep[0.05].sent["killed"] < 4.2 * start.num_parameters + 2048
    assert bytes_by_keep[0.05].received["input"] < 0.15 * bytes_by_keep[1.0].received["input"]


def test_other_values_of_killed_modules_are_another_session() -> None:
    """As at the beginning of a round, when the common adapter has changed and the active modules have not."""
    start = adapters(random_model("llama", BLOCKS))
    choosing = selector(start, Schedule(0, None, ever=True), policy="last-layers", keep=0.1)
    moved = AdapterState("lora", {n: ModuleAdapter(a.down_RI, torch.full_like(a.up_OR, 0.05), a.scaling) for n, a in start.modules.items()})
    base = Base("llama", random_model("llama", BLOCKS), None, False)  # type: ignore[arg-type]
    local = LocalTrainer(base, Train(learning_rate=2e-3), STEPS, 0.0, 0, "north", selector=choosing)
    trainer, _ = device_trainer("llama", Cut(0, 0), thread_host(served(random_model("llama", BLOCKS))))
    split = replace(trainer, selector=choosing)
    updates = []
    for one in (local, split):
        first = one.fit(TrainState(start, {}, 0), stream(), FitPlan(2, 1, False), Steps([]))
        updates.append(one.fit(replace(first.state, adapter=moved), stream(), FitPlan(2, 1, False), Steps([])))
    assert [report.loss for report in updates[1].reports] == pytest.approx([report.loss for report in updates[0].reports], rel=1e-5)
    assert difference(updates[0].state.adapter, updates[1].state.adapter) < 1e-5


def test_what_is_merged_goes_with_the_session() -> None:
    """Without waiting for the garbage collector: every period opens sessions, each with copies of weights."""
    start = adapters(random_model("llama", BLOCKS))
    killed = [KilledModule(name, "lora", adapter, merge=True) for name, adapter in start.modules.items()]
    gc.disable()
    try:
        middle = Middle(random_model("llama", BLOCKS), Cut(0, 0), [], returns_tuple=False, factored=False, peer=None, killed=killed)  # type: ignore[arg-type]
        name = next(iter(start.modules))
        weight = weakref.ref(middle._view.get_submodule(name).weight)
        assert weight() is not None
        middle.close()
        assert weight() is None
    finally:
        gc.enable()
