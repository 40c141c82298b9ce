"""Training through a host gives what training with the whole base gives: the oracle of the split."""

from __future__ import annotations

import pytest
import torch

from atoll.adapters.state import AdapterState
from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.engines.local import LocalTrainer
from atoll.engines.split.cut import Cut
from atoll.engines.trainer import FitPlan, TrainState, Update

from tests.conftest import random_model
from tests.engines.conftest import Steps, adapters, stream
from tests.engines.split.conftest import BLOCKS, device_trainer, served, thread_host

STEPS = 20
CUTS = {"0-0": Cut(0, 0), "1-0": Cut(1, 0), "1-1": Cut(1, 1)}
PLAN = FitPlan(STEPS, 1, False)


def local(family: str, start: AdapterState, batching: str = "bucket", plan: FitPlan = PLAN) -> Update:
    """What training without a host gives."""
    base = Base(family, random_model(family, BLOCKS), None, family == "gpt2")  # type: ignore[arg-type]
    trainer = LocalTrainer(base, Train(learning_rate=2e-3), STEPS, 0.0, 0, "north")
    return trainer.fit(TrainState(start, None, 0), stream(batching=batching), plan, Steps([]))


def difference(a: AdapterState, b: AdapterState) -> float:
    """Relative, over all numbers."""
    flat = [torch.cat([t.flatten() for m in state.modules.values() for t in (m.down_RI, m.up_OR)]) for state in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


@pytest.mark.parametrize("mode", ["dense", "factored"])
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("cut", CUTS)
def test_split_equals_local(family: str, cut: str, kind: str, mode: str) -> None:
    start = adapters(random_model(family, BLOCKS), kind)
    trainer, client = device_trainer(family, CUTS[cut], thread_host(served(random_model(family, BLOCKS))), kind=kind, mode=mode)
    update = trainer.fit(TrainState(start, None, 0), stream(), PLAN, Steps([]))
    wanted = local(family, start)
    assert difference(wanted.state.adapter, update.state.adapter) < 1e-5
    assert difference(start, update.state.adapter) > 1e-2
    assert client.account.sent["forward"] > 0
