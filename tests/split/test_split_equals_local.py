"""Training through a host gives what training with the whole base gives: the oracle of the split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atoll.adapters.state import AdapterState
from atoll.base.load import Base, load_base
from atoll.config.schema import Train
from atoll.split.cut import Cut
from atoll.split.host.blocks.middle import shared_view
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState, Update

from tests.conftest import FAMILIES, random_model, save_model_folder
from tests.pieces import Steps, adapters, stream
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

STEPS = 20
CUTS = {"0-0": Cut(0, 0), "1-0": Cut(1, 0), "1-1": Cut(1, 1)}
PLAN = FitPlan(STEPS, 1, False)


def local(family: str, start: AdapterState, batching: str = "bucket", plan: FitPlan = PLAN) -> Update:
    """What training without a host gives."""
    base = Base(family, random_model(family, BLOCKS), None, family == "gpt2")  # type: ignore[arg-type]
    trainer = LocalTrainer(base, Train(learning_rate=2e-3), STEPS, 0.0, 0, "north")
    return trainer.fit(TrainState(start, {}, 0), stream(batching=batching), plan, Steps([]))


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
    update = trainer.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    wanted = local(family, start)
    assert difference(wanted.state.adapter, update.state.adapter) < 1e-5
    assert difference(start, update.state.adapter) > 1e-2
    assert client.account.sent["forward"] > 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
def test_a_quantized_host_is_a_quantized_base(bits: int, mode: str, tmp_path: Path) -> None:
    save_model_folder(tmp_path, "llama")
    start = adapters(random_model("llama"))
    whole = LocalTrainer(load_base(str(tmp_path), bits=bits), Train(learning_rate=2e-3), STEPS, 0.0, 0, "north")
    wanted = whole.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    host = served(load_base(str(tmp_path), bits=bits).model)
    trainer, _ = device_trainer(load_base(str(tmp_path)).model, CUTS["0-0"], thread_host(host), mode=mode)
    update = trainer.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    # The library rounds activations to fp16 in its 8-bit product, which multiplies what another order of sums changes.
    assert difference(wanted.state.adapter, update.state.adapter) < (1e-2 if bits == 8 else 1e-5)
    assert difference(start, update.state.adapter) > 1e-2


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
def test_a_lossy_codec_is_near_and_not_the_same(codec: str, mode: str) -> None:
    start = adapters(random_model("llama", BLOCKS))
    host = served(random_model("llama", BLOCKS))
    updates, sizes = {}, {}
    for name in ("fp32", codec):
        trainer, client = device_trainer("llama", CUTS["1-0"], thread_host(host), mode=mode, codec=name)
        updates[name] = trainer.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
        sizes[name] = client.account.sent.total() + client.account.received.total()
    assert 1e-7 < difference(updates["fp32"].state.adapter, updates[codec].state.adapter) < 0.2
    of_all = {"bf16": 0.62, "fp16": 0.65, "int8": 0.5}[codec]
    assert sizes[codec] < (of_all if mode != "lent" else 0.95) * sizes["fp32"]


@pytest.mark.parametrize("mode", ["dense", "factored"])
@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_accumulated_and_packed_batches(mode: str, batching: str) -> None:
    start, plan = adapters(random_model("llama", BLOCKS)), FitPlan(8, 3, False)
    trainer, _ = device_trainer("llama", CUTS["1-1"], thread_host(served(random_model("llama", BLOCKS))), mode=mode)
    update = trainer.fit(TrainState(start, {}, 0), stream(batching=batching), plan, Steps([]))
    assert difference(local("llama", start, batching, plan).state.adapter, update.state.adapter) < 1e-5


@pytest.mark.parametrize("names", [["layers.0"], ["layers.2"], ["layers.1.self_attn.k_proj", "layers.1.mlp.up_proj"]])
def test_any_choice_of_modules(names: list[str]) -> None:
    """Adapters on the device's own blocks alone, at either end, and on a part of two groups alone."""
    every = adapters(random_model("llama", BLOCKS))
    start = AdapterState("lora", {name: one for name, one in every.modules.items() if any(part in name for part in names)})
    trainer, _ = device_trainer("llama", CUTS["1-1"], thread_host(served(random_model("llama", BLOCKS))))
    update = trainer.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    wanted = local("llama", start)
    assert difference(wanted.state.adapter, update.state.adapter) < 1e-5
    assert [report.loss for report in update.reports] == pytest.approx([report.loss for report in wanted.reports], rel=1e-5)


@pytest.mark.parametrize("mode", ["dense", "factored"])
def test_rank_one(mode: str) -> None:
    """A matrix of one row is its own contiguous transpose, and would be the living parameter itself."""
    start = adapters(random_model("llama", BLOCKS), rank=1)
    trainer, _ = device_trainer("llama", CUTS["1-0"], thread_host(served(random_model("llama", BLOCKS))), mode=mode)
    update = trainer.fit(TrainState(start, {}, 0), stream(), PLAN, Steps([]))
    assert difference(local("llama", start).state.adapter, update.state.adapter) < 1e-4


def test_sessions_do_not_share_what_a_long_row_leaves_behind() -> None:
    """Dynamic rotary tables are made anew for a row longer than any before; another session's short rows do not see it."""
    config = AutoConfig.for_model("llama", **FAMILIES["llama"] | {"max_position_embeddings": 8})
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    views = [shared_view(model) for _ in range(2)]
    short, long = torch.arange(3, 9)[None], torch.arange(3, 63)[None]
    with torch.no_grad():
        before = views[0](input_ids=short).logits
        views[1](input_ids=long)
        assert torch.equal(views[0](input_ids=short).logits, before)
        assert not any(view.model.rotary_emb.inv_freq is model.model.rotary_emb.inv_freq for view in views[1:])
