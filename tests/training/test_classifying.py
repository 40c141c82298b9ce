"""Training a classifier: the step against PEFT with torch's AdamW, and a warm-up that leaves the head out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from atoll.adapters.fresh import fresh_adapters, fresh_full_weights, head_state
from atoll.adapters.places import module_size
from atoll.adapters.state import AdapterState
from atoll.base.classifier import load_classifier
from atoll.base.load import Base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Data, Train
from atoll.tasks.batches import BatchStream
from atoll.tasks.classes import examples_of, form_of
from atoll.tasks.rows import load_rows
from atoll.training.importance_warmup import WarmUp, warm_up
from atoll.training.local_trainer import LocalTrainer
from atoll.training.step import learning_rate_at
from atoll.training.trainer import FitPlan, TrainState

from tests.classifiers import LABELS, library_model, save_base, write_rows

STEPS = 5


def parts(folder: Path, family: str) -> tuple[Base, BatchStream, dict[str, tuple[int, int]]]:
    """A classifier, its batches, and the sizes of its blocks' modules."""
    save_base(folder / "base", family)
    write_rows(folder / "rows.jsonl")
    base, rows = load_classifier(str(folder / "base"), LABELS), load_rows("rows.jsonl", base_dir=folder, limit=None, on_bad_row="error")
    examples = examples_of(rows, form_of(Data(label="kind"), rows, LABELS), base.tokenizer, 16)
    sizes = {m.name: module_size(base.model.get_submodule(m.name)) or (0, 0) for m in read_shapes(str(folder / "base"), 3).modules}
    return base, BatchStream(examples, batch_size=4, seed=0, edge="north", batching="bucket", pad_id=0), sizes


def with_head(state: AdapterState, base: Base) -> AdapterState:
    return AdapterState(state.kind, state.modules, {**state.full_weights, **head_state(base.head).full_weights})


@pytest.mark.parametrize("family", ["bert", "bert without a pooler", "llama", "gpt2"])
def test_training_equals_peft_with_torchs_adamw(family: str, tmp_path: Path) -> None:
    """Adapters and head, through the library's modules, loss, clipping and optimizer."""
    base, batches, sizes = parts(tmp_path, family)
    start = with_head(fresh_adapters("lora", sizes, dict.fromkeys(sizes, 4), alpha=8, seed=0), base)
    engine = LocalTrainer(base, Train(learning_rate=1e-2, grad_clip=0.5), STEPS, 0.0, 0, "north")
    ours = engine.fit(TrainState(start, {}, 0), batches, FitPlan(STEPS, 1, False), lambda _: None).state.adapter
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(sizes), task_type="SEQ_CLS", modules_to_save=list(base.head), fan_in_fan_out=family == "gpt2"
    )
    model = get_peft_model(library_model(tmp_path / "base"), config).eval()
    leaves: dict[str, tuple[torch.nn.Parameter, ...]] = {}
    for name, part in start.parts.items():
        module = model.get_submodule(f"base_model.model.{name}")
        if name in start.full_weights:
            leaves[name] = tuple(module.modules_to_save["default"].parameters())  # type: ignore[index, union-attr]
        else:
            leaves[name] = (module.lora_A["default"].weight, module.lora_B["default"].weight)  # type: ignore[index, union-attr]
        for leaf, value in zip(leaves[name], part.tensors, strict=True):
            leaf.data.copy_(value)
    numbers = [leaf for one in leaves.values() for leaf in one]
    assert {id(leaf) for leaf in numbers} == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(numbers, lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        batch = batches.batch(step)
        real = (torch.arange(batch.input_ids_BT.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
        logits = model(input_ids=batch.input_ids_BT, attention_mask=real).logits
        torch.nn.functional.cross_entropy(logits, batch.target_N).backward()
        torch.nn.utils.clip_grad_norm_(numbers, 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate_at(engine.train, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    for name, part in ours.parts.items():
        for leaf, value in zip(leaves[name], part.tensors, strict=True):
            torch.testing.assert_close(value, leaf.data, rtol=1e-3, atol=2e-4)
    assert not torch.equal(ours.full_weights[list(base.head)[-1]].change_OI, start.full_weights[list(base.head)[-1]].change_OI)


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "full"])
def test_loss_falls_whatever_is_trained_beside_the_head(kind: str, tmp_path: Path) -> None:
    base, batches, sizes = parts(tmp_path, "llama")
    ranks = dict.fromkeys(sizes, 4)
    fresh = fresh_full_weights(sizes, sizes) if kind == "full" else fresh_adapters(kind, sizes, ranks, alpha=8, seed=0)  # type: ignore[arg-type]
    engine, told = LocalTrainer(base, Train(learning_rate=1e-2), 40, 0.0, 0, "north"), []
    update = engine.fit(TrainState(with_head(fresh, base), {}, 0), batches, FitPlan(40, 1, False), told.append)
    assert update.reports[-1].loss < 0.5 * update.reports[0].loss
    assert told[0].num_label_tokens == 4, "a row is one label"
    assert set(update.trained) == {*sizes, *base.head}


@pytest.mark.parametrize("kind", ["svd-sensitivity", "gradient-weight"])
def test_a_warm_up_scores_the_blocks_and_leaves_the_head_as_it_is(kind: str, tmp_path: Path) -> None:
    base, batches, sizes = parts(tmp_path, "bert")
    before = head_state(base.head).digest()
    module_scores = warm_up(base, sizes, batches, WarmUp(kind, 4, 2, 8.0, Train(learning_rate=1e-2), 0, "north"))  # type: ignore[arg-type]
    assert module_scores.scores.keys() == sizes.keys()
    assert all(score > 0 for score in module_scores.scores.values()), "a zero head would let no gradient through"
    assert head_state(base.head).digest() == before
