"""Tiny random bases to classify with, and rows with classes, for tests of several rooms."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.conftest import SMALL, save_model_folder

LABELS = ("animal", "plant", "stone")


def save_bert_folder(folder: Path, *, pooler: bool = True) -> None:
    """A random BERT with a word tokenizer that frames rows with [CLS] and [SEP]; without a pooler, as a masked language model is saved."""
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, **{f"w{n}": n + 3 for n in range(93)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[PAD]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64)
    model = BertModel(config) if pooler else BertForMaskedLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def save_base(folder: Path, family: str) -> None:
    """A base of the family."""
    if family.startswith("bert"):
        save_bert_folder(folder, pooler=family == "bert")
    else:
        save_model_folder(folder, family)


def library_model(folder: Path) -> PreTrainedModel:
    """What the library makes of the folder; its head is random."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS)).eval()
    model.config.pad_token_id = 0
    return model


def write_rows(path: Path, num_rows: int = 36) -> None:
    """Rows whose first word tells the class, of unequal lengths, and an owner of each."""
    rows = []
    for n in range(num_rows):
        label, words = n % len(LABELS), " ".join(f"w{(n * 7 + k) % 60 + 20}" for k in range(2 + n % 5))
        rows.append({"owner": ("north", "south")[n // 3 % 2], "text": f"w{label} {words} w{label}", "kind": LABELS[label]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
