"""A base that tells the class of a row: its blocks frozen, and a head on them whose full weights are always trained.

Shape suffixes: B rows, T positions, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from atoll.base.families import FAMILIES, Family
from atoll.base.head import TokenBatch, hidden_states
from atoll.base.headers import read_headers
from atoll.base.load import (
    DTYPES,
    Base,
    check_folder,
    check_vocabulary,
    check_whole,
    load_config,
    load_model,
    load_tokenizer,
    quiet,
)
from atoll.base.quantize import Bits, check_kept, how_to_keep
from atoll.embedded import tiny_path
from atoll.errors import ArchitectureError
from atoll.heap import map_large_tensors
from atoll.seeding import stream

_HEADS = ("lm_head.", "embed_out.", "cls.", "pooler.")
"""Of weights that are not of a classifier."""


@dataclass(frozen=True, slots=True)
class RowClass:
    """Tell the class of each row."""

    def loss_sum(self, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
        """Sum of the cross-entropy over all rows."""
        return nn.functional.cross_entropy(class_logits_BK(model, batch), batch.target_N, reduction="sum")

    def frozen_head(self, model: PreTrainedModel) -> Tensor:
        """None of it is frozen."""
        return torch.empty(0)


def class_logits_BK(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Logits of the classes of each row, as the library's own classifier has them: of a decoder, from the row's last token.

    Shapes: (B, K), fp32; the batch's predict_N are the last tokens.
    """
    family = FAMILIES[model.config.model_type]
    if family.causal:
        h_BD = hidden_states(model, batch).flatten(0, 1)[batch.predict_N]
        logits: Tensor = model.get_submodule(family.classifier)(h_BD)
    else:
        logits = model(input_ids=batch.input_ids_BT, attention_mask=_real_tokens_BT(batch)).logits
    return logits.float()


def load_classifier(name: str, labels: Sequence[str], *, precision: str = "fp32", bits: Bits | None = None, seed: int = 0) -> Base:
    """The base called `name` as a classifier; a head that the folder does not have is random, by the seed.

    Precision and bits are those of load_base; the head is never quantized.

    Raises: as load_base; ArchitectureError for a family whose classifier is not known here.
    """
    map_large_tensors()
    source = str(tiny_path()) if name == "tiny" else name
    quantization: Any = None if bits is None else how_to_keep(bits, DTYPES[precision])
    check_folder(source)
    check_whole(source)
    with quiet():
        config = load_config(source)
        family = _family_of(source, config)
        tokenizer = load_tokenizer(name)
        _describe(config, labels, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)
        stored = read_headers(source).tensors
        modules = head_modules(family, stored)
        # What predicts tokens, or belongs to another head.
        left = (f"{family.head}.", *_HEADS)
        if hasattr(quantization, "llm_int8_skip_modules"):
            quantization.llm_int8_skip_modules = [module for module in (family.classifier, family.pooler) if module is not None]
        model = load_model(
            source, config, precision, quantization, family=AutoModelForSequenceClassification, may_miss=modules, may_stay=left
        )  # fmt: skip
    check_vocabulary(source, model, tokenizer)
    if bits is not None and quantization is not None:
        check_kept(name, model, bits)
    for module in modules:
        if not _is_stored(module, stored):
            _fill(model.get_submodule(module), float(getattr(config, "initializer_range", 0.02)), stream(seed, f"head/{module}"))
    _check_logits(model)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    return Base(name, model, tokenizer, transposed, RowClass(), tuple(labels), {module: _taken(model, module) for module in modules})


def head_modules(family: Family, stored: Mapping[str, object]) -> tuple[str, ...]:
    """The modules of a classifier's head that are trained: its last one, and a pooler that the weights are without."""
    return (*([] if family.pooler is None or _is_stored(family.pooler, stored) else [family.pooler]), family.classifier)


def _is_stored(module: str, stored: Mapping[str, object]) -> bool:
    """Whether weight files have a module; those of a bare encoder leave out the first component of its name."""
    return any(f"{name}.weight" in stored for name in (module, module.partition(".")[2]))


def _family_of(source: str, config: Any) -> Family:
    family = FAMILIES.get(config.model_type)
    if family is None or type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ArchitectureError(
            "it is not known here how this family classifies", where=source, got=f"model_type = {config.model_type!r}",
            expected="one of " + ", ".join(sorted(FAMILIES)), do='choose another base, or write task = "generate" below [model]',
        )  # fmt: skip
    return family


def _describe(config: Any, labels: Sequence[str], pad_id: int) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = pad_id


def _fill(module: Any, deviation: float, seed: int) -> None:
    """Normal weights, and no bias, as the library starts a new head."""
    generator = torch.Generator().manual_seed(seed)
    module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) * deviation)
    if module.bias is not None:
        module.bias.data.zero_()


def _taken(model: PreTrainedModel, name: str) -> tuple[Tensor, ...]:
    """A module's weight and bias, of which zeros are left in the model."""
    parameters: list[Any] = list(model.get_submodule(name).parameters())
    values = tuple(parameter.detach().float().cpu().clone() for parameter in parameters)
    for parameter in parameters:
        parameter.data.zero_()
    return values


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """Two rows of unequal length, to compare logits on."""

    input_ids_BT: Tensor
    predict_N: Tensor
    target_N: Tensor
    lengths: tuple[int, ...] = (3, 5)
    position_ids_BT: Tensor | None = None
    attention_B1TT: Tensor | None = None


@torch.no_grad()
def _check_logits(model: PreTrainedModel) -> None:
    """Compare this file's logits with the model's own.

    Raises: ArchitectureError where they differ, rather than train for something else than what the library evaluates.
    """
    config, device = model.config.get_text_config(), model.device
    ids_BT = torch.arange(1, 11, device=device).remainder(config.vocab_size).view(2, 5)
    ids_BT[ids_BT == config.pad_token_id] += 1
    ids_BT[0, 3:] = config.pad_token_id
    batch = _Trial(ids_BT, torch.tensor([2, 9], device=device), torch.zeros(2, dtype=torch.int64, device=device))
    own, theirs = class_logits_BK(model, batch), model(input_ids=ids_BT, attention_mask=_real_tokens_BT(batch)).logits.float()
    if not torch.allclose(own, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()) + 1e-6):
        raise ArchitectureError(
            f"{type(model).__name__} does something to its logits that Atoll does not know", got="different logits for the same rows",
            expected="a head on the row's last token", do="use another model family, and report this one",
        )  # fmt: skip


def _real_tokens_BT(batch: TokenBatch) -> Tensor | None:
    """1 for tokens and 0 for padding; None where there is no padding."""
    width = batch.input_ids_BT.shape[1]
    if min(batch.lengths) == width:
        return None
    device = batch.input_ids_BT.device
    return (torch.arange(width, device=device) < torch.tensor(batch.lengths, device=device)[:, None]).long()
