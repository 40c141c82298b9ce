"""Kill-and-Revive through a host is Kill-and-Revive with the whole base: the same sets, the same adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.engines.local import LocalTrainer
from atoll.engines.split.cut import Cut
from atoll.engines.trainer import FitPlan, TrainState
from atoll.selection.schedule import Schedule

from tests.conftest import random_model
from tests.engines.conftest import HOW_KILLED, Steps, adapters, chooser, stream
from tests.engines.split.conftest import BLOCKS, device_trainer, served, thread_host
from tests.engines.split.test_split_equals_local import CUTS, difference

STEPS = 20
PLAN, SCHEDULE = FitPlan(STEPS, 1, False), Schedule(3, 8, ever=True)


@pytest.mark.parametrize("mode", ["dense", "factored"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("kind", "killed"), HOW_KILLED)
def test_split_equals_local(kind: str, killed: str, cut: str, mode: str) -> None:
    start = adapters(random_model("llama", BLOCKS), kind)
    choosing = chooser(start, SCHEDULE, front=CUTS[cut].front, policy="kill-and-revive", keep=0.15, killed=killed)
    base = Base("llama", random_model("llama", BLOCKS), None, False)  # type: ignore[arg-type]
    local = LocalTrainer(base, Train(learning_rate=2e-3), STEPS, 0.0, 0, "north", chooser=choosing)
    wanted = local.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    trainer, client = device_trainer("llama", CUTS[cut], thread_host(served(random_model("llama", BLOCKS))), kind=kind, mode=mode)
    update = replace(trainer, chooser=choosing).fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    assert [report.active for report in update.reports] == [report.active for report in wanted.reports]
    assert difference(wanted.state.adapter, update.state.adapter) < 1e-5
    assert len({report.active for report in update.reports}) > 2
    assert (client.account.sent["killed"] > 0) == (killed != "skip")


def test_killed_modules_cross_in_full_precision_and_groups_without_active_ones_not_at_all() -> None:
    start = adapters(random_model("llama", BLOCKS))
    bytes_by_keep = {}
    for keep in (0.05, 1.0):
        choosing = chooser(start, Schedule(1, None, ever=True), policy="early-kill", keep=keep)
        trainer, client = device_trainer("llama", Cut(0, 0), thread_host(served(random_model("llama", BLOCKS))), codec="int8")
        replace(trainer, chooser=choosing).fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
        bytes_by_keep[keep] = client.account
    killed = start.num_parameters - start.modules[next(iter(start.modules))].num_parameters
    assert bytes_by_keep[1.0].sent["killed"] == 0
    assert 4 * killed <= bytes_by_keep[0.05].sent["killed"] < 4.2 * start.num_parameters + 2048
    assert bytes_by_keep[0.05].received["input"] < 0.15 * bytes_by_keep[1.0].received["input"]
