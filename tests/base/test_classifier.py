"""Bases as classifiers: their logits and head against the library's own, and their shapes against the loaded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from atoll.adapters.attach import attached
from atoll.adapters.fresh import head_state
from atoll.base.classifier import class_logits_BK, load_classifier
from atoll.base.load import Base
from atoll.base.read_shapes import read_shapes
from atoll.errors import ArchitectureError
from atoll.tasks.batches import pad_batch
from atoll.tasks.tokens import Example

from tests.classifiers import LABELS, library_model, save_base, save_bert_folder
from tests.conftest import FAMILIES

BASES = ["bert", "bert without a pooler", *sorted(FAMILIES)]


def batch():  # type: ignore[no-untyped-def]
    """Two rows of unequal length, without padding tokens in them."""
    ids = [torch.arange(5, 5 + length, dtype=torch.int32).numpy() for length in (4, 9)]
    return pad_batch([Example(one, one > 1000, number) for number, one in enumerate(ids)], pad_id=0)


def give_head(base: Base, folder: Path) -> torch.Tensor:
    """The library's logits for the batch, with our head in its model."""
    model, rows = library_model(folder), batch()
    for name, tensors in base.head.items():
        for parameter, value in zip(model.get_submodule(name).parameters(), tensors, strict=True):
            parameter.data.copy_(value)
    real = (torch.arange(rows.input_ids_BT.shape[1]) < torch.tensor(rows.lengths)[:, None]).long()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=rows.input_ids_BT, attention_mask=real).logits
    return logits


@pytest.mark.parametrize("family", BASES)
def test_logits_are_those_of_the_library(family: str, tmp_path: Path) -> None:
    save_base(tmp_path, family)
    base = load_classifier(str(tmp_path), LABELS)
    with torch.no_grad(), attached(base.model, head_state(base.head)):
        ours = class_logits_BK(base.model, batch())
    torch.testing.assert_close(ours, give_head(base, tmp_path), rtol=1e-4, atol=1e-5)
    assert ours.abs().max() > 1e-3
    with torch.no_grad():
        assert not class_logits_BK(base.model, batch()).any(), "in the base itself the head is zero"
    assert base.model.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("family", ["bert", "bert without a pooler", "llama", "gpt2"])
def test_shapes_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    save_base(tmp_path, family)
    shapes, base = read_shapes(str(tmp_path), len(LABELS)), load_classifier(str(tmp_path), LABELS)
    assert shapes.num_parameters == sum(parameter.numel() for parameter in base.model.parameters())
    assert {module.name for module in shapes.head if module.full_weights} == set(base.head)
    assert shapes.num_head_parameters == sum(tensor.numel() for tensors in base.head.values() for tensor in tensors)
    names = {name for name, _ in base.model.named_modules()}
    assert {module.name for module in shapes.modules} <= names
    assert shapes.modules, "adapters need somewhere to go"


def test_berts_modules_have_their_kinds_and_stages(tmp_path: Path) -> None:
    save_bert_folder(tmp_path)
    block = [module for module in read_shapes(str(tmp_path), 3).modules if module.block == 0]
    assert [(module.name.removeprefix("bert.encoder.layer.0."), module.kind, module.stage) for module in block] == [
        ("attention.self.query", "attention", 0), ("attention.self.key", "attention", 0), ("attention.self.value", "attention", 0),
        ("attention.output.dense", "attention", 1), ("intermediate.dense", "mlp", 2), ("output.dense", "mlp", 3),
    ]  # fmt: skip


def test_equal_seeds_give_equal_heads(tmp_path: Path) -> None:
    save_base(tmp_path, "llama")
    heads = [head_state(load_classifier(str(tmp_path), LABELS, seed=seed).head).digest() for seed in (0, 0, 1)]
    assert heads[0] == heads[1] != heads[2]


def test_a_head_that_the_folder_has_is_kept(tmp_path: Path) -> None:
    save_bert_folder(tmp_path / "plain")
    model = library_model(tmp_path / "plain")
    model.classifier.bias.data.fill_(0.5)
    model.save_pretrained(tmp_path / "head")
    save_bert_folder(tmp_path / "tokens")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "head" / file).write_text((tmp_path / "tokens" / file).read_text())
    base = load_classifier(str(tmp_path / "head"), LABELS)
    assert torch.equal(base.head["classifier"][0], model.classifier.weight)
    assert torch.equal(base.head["classifier"][1], torch.full((3,), 0.5))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_quantized_base_keeps_its_head_and_nearly_its_logits(family: str, bits: int, tmp_path: Path) -> None:
    save_base(tmp_path, family)
    whole, narrow = load_classifier(str(tmp_path), LABELS), load_classifier(str(tmp_path), LABELS, bits=bits)  # type: ignore[arg-type]
    assert head_state(whole.head).digest() == head_state(narrow.head).digest()
    with torch.no_grad(), attached(whole.model, head_state(whole.head)), attached(narrow.model, head_state(narrow.head)):
        wide, ours = class_logits_BK(whole.model, batch()), class_logits_BK(narrow.model, batch())
    assert 0 < (ours - wide).abs().max() < {16: 0.02, 8: 0.05, 4: 0.2}[bits]


def test_what_cannot_classify_or_generate_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path, "bert")
    with pytest.raises(ArchitectureError, match="causal"):
        read_shapes(str(tmp_path))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "roberta"}))
    for refused in (lambda: load_classifier(str(tmp_path), LABELS), lambda: read_shapes(str(tmp_path), 3)):
        with pytest.raises(ArchitectureError, match="classifies"):
            refused()
