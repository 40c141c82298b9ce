"""The training step against plain PyTorch and PEFT, and its own laws: reruns, continuation, accumulation, checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from atoll.adapters import layers
from atoll.base import head
from atoll.base.head import token_losses_N
from atoll.config.schema import Train
from atoll.cost import meters
from atoll.training.local_trainer import LocalTrainer
from atoll.training.step import learning_rate_at
from atoll.training.trainer import FitPlan, StepReport, TrainState, Update

from tests.conftest import random_model
from tests.pieces import adapters, stream, trainer


def fit(engine: LocalTrainer, steps: int = 6, state: TrainState | None = None, accumulate: int = 1, checkpointing: bool = False,
        batch_size: int = 4, batching: str = "bucket", kind: str = "lora") -> Update:  # fmt: skip
    state = state or TrainState(adapters(engine.base.model, kind), {}, 0)
    batches, plan = stream(batch_size=batch_size, batching=batching), FitPlan(steps, accumulate, checkpointing)
    return engine.fit(state, batches, plan, lambda _report: None)


def test_training_equals_peft_with_torchs_adamw(family: str) -> None:
    """Six steps of ours against the library's modules, loss, optimizer, clipping and schedule."""
    engine = trainer(family, weight_decay=0.1, warmup_steps=2, grad_clip=0.5)
    ours = fit(engine).state.adapter
    start = adapters(engine.base.model)
    model = get_peft_model(random_model(family), LoraConfig(r=4, lora_alpha=8, target_modules=list(start.modules), task_type="CAUSAL_LM"))
    pairs = {}
    for name, adapter in start.modules.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        pairs[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        pairs[name][0].data.copy_(adapter.down_RI)
    parameters = [p for pair in pairs.values() for p in pair]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step in range(6):
        batch = stream().batch(step)
        labels = torch.full(batch.input_ids_BT.shape, -100).flatten()
        labels[batch.predict_N + 1] = batch.target_N
        model(input_ids=batch.input_ids_BT, labels=labels.view_as(batch.input_ids_BT)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate_at(engine.train, step, 6)
        optimizer.step()
        optimizer.zero_grad()
    for name, (down, up) in pairs.items():
        torch.testing.assert_close(ours.modules[name].down_RI, down.data, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.modules[name].up_OR, up.data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "dropout"), [("lora", 0.0), ("lora", 0.3), ("bottleneck", 0.0)])
def test_a_rerun_gives_the_same_bits(kind: str, dropout: float) -> None:
    first, second = (fit(trainer(dropout=dropout), kind=kind) for _ in range(2))
    assert first.state.adapter.digest() == second.state.adapter.digest()
    assert first.reports == second.reports


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_stopping_and_going_on_gives_the_same_bits(dropout: float) -> None:
    engine = trainer(dropout=dropout, warmup_steps=1)
    whole = fit(engine)
    half = fit(engine, 3)
    rest = fit(engine, 3, half.state)
    assert rest.state.adapter.digest() == whole.state.adapter.digest()
    assert half.reports + rest.reports == whole.reports
    assert {moments.num_steps for moments in rest.state.optimizer.values()} == {6}


def test_the_state_given_is_not_changed() -> None:
    engine = trainer()
    state = TrainState(adapters(engine.base.model), {}, 0)
    before, base = state.adapter.digest(), engine.base.digest()
    after = fit(engine, state=state)
    assert state.adapter.digest() == before != after.state.adapter.digest()
    assert engine.base.digest() == base, "the base is frozen"


def test_training_lowers_the_loss_of_every_family(family: str) -> None:
    update = fit(trainer(family, total_steps=20), 20)
    assert update.reports[-1].loss < update.reports[0].loss


def test_accumulation_equals_one_large_batch() -> None:
    """Weighted by label tokens, not by micro-batches, which hold unequal numbers of them."""
    large = fit(trainer(), batch_size=12, batching="shuffle")
    small = fit(trainer(), batch_size=4, accumulate=3, batching="shuffle")
    assert [r.loss for r in large.reports] == pytest.approx([r.loss for r in small.reports], rel=1e-4)
    for name, adapter in large.state.adapter.modules.items():
        torch.testing.assert_close(adapter.up_OR, small.state.adapter.modules[name].up_OR, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_no_result(family: str) -> None:
    engine = trainer(family, dropout=0.2)
    plain, recomputed = fit(engine, 3), fit(engine, 3, checkpointing=True)
    assert recomputed.state.adapter.digest() == plain.state.adapter.digest()


def test_gradient_checkpointing_recomputes_blocks() -> None:
    """Counted, because equal results alone would also come from not recomputing."""
    engine, calls = trainer(), []
    hook = engine.base.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    fit(engine, 1)
    once = len(calls)
    fit(engine, 1, checkpointing=True)
    hook.remove()
    assert (once, len(calls) - once) == (1, 2)


def test_bf16_trains_with_fp32_adapters() -> None:
    engine = trainer(total_steps=20)
    engine.base.model.to(torch.bfloat16)
    update = fit(engine, 20)
    assert all(a.up_OR.dtype == torch.float32 for a in update.state.adapter.modules.values())
    assert update.reports[-1].loss < update.reports[0].loss
    assert math.isfinite(update.mean_loss)


def test_packed_rows_have_the_losses_they_have_alone() -> None:
    model = random_model("llama")
    packed = stream(batch_size=12, batching="pack").batch(0)
    padded = stream(batch_size=12).batch(0)
    torch.testing.assert_close(token_losses_N(model, packed).sort()[0], token_losses_N(model, padded).sort()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("schedule", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.1), ("cosine", 0.5, 0.0245)])
def test_schedules(schedule: str, middle: float, last: float) -> None:
    train = Train(learning_rate=2.0, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate_at(train, 0, 10) == 2.0
    assert learning_rate_at(train, 5, 10) == pytest.approx(2.0 * middle)
    assert learning_rate_at(train, 9, 10) == pytest.approx(2.0 * last, rel=1e-2)
    warm = train.model_copy(update={"warmup_steps": 4})
    assert [learning_rate_at(warm, step, 14) for step in range(5)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_the_first_step_of_all_is_counted_and_no_other() -> None:
    """The head in whatever chunks; a step that is done anew counts once; where training goes on, nothing is counted."""
    engine = trainer()
    update = fit(engine, 3)
    counted = update.reports[0].counted
    assert counted is not None
    assert [report.counted for report in update.reports[1:]] == [None, None]
    assert fit(engine, 1, update.state).reports[0].counted is None
    weight = head.head_of(engine.base.model).weight_VD
    assert counted.head_flops == 4 * update.reports[0].num_label_tokens * weight.numel()

    def twice(step: Callable[[], StepReport]) -> StepReport:
        step()
        return step()

    assert fit(replace(engine, attempt=twice), 1).reports[0].counted == counted


def test_a_head_in_chunks_is_counted_whole(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    whole = fit(trainer(family), 1, batch_size=12).reports[0].counted
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)  # 16 tokens each
    assert fit(trainer(family), 1, batch_size=12).reports[0].counted == whole


@pytest.mark.parametrize(("kind", "small"), [("lora", 64), ("lora", 0), ("bottleneck", 64)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counting_changes_no_result(monkeypatch: pytest.MonkeyPatch, kind: str, small: int, checkpointing: bool, family: str) -> None:
    monkeypatch.setattr(layers, "SMALL_WIDTH", small)
    counted = fit(trainer(family, dropout=0.2), 2, kind=kind, checkpointing=checkpointing)
    monkeypatch.setattr(meters.CountedFlops, "__enter__", lambda count: count)
    uncounted = fit(trainer(family, dropout=0.2), 2, kind=kind, checkpointing=checkpointing)
    assert counted.reports[0].counted is not None
    assert uncounted.reports[0].counted == meters.CountedStep(0, 0)
    assert counted.state.adapter.digest() == uncounted.state.adapter.digest()
