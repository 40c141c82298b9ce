"""Rows that are told apart: as tokens with a class, and how well a classifier tells them.

Shape suffixes: B rows, N all rows, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from atoll.base.classifier import class_logits_BK
from atoll.config.schema import Data
from atoll.errors import EmptyDataError
from atoll.tasks.batches import pad_batch
from atoll.tasks.rows import RowProblem, Rows
from atoll.tasks.text import Classes, TextForm, row_form
from atoll.tasks.tokens import CHUNK_ROWS, Example, Examples, pad_id, skip_or_raise, tokenize
from atoll.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atoll.base.load import Base


def form_of(data: Data, rows: Rows, labels: Sequence[str]) -> TextForm:
    """How rows become text, and classes where there are `labels`.

    Raises: as row_form.
    """
    return with_classes(row_form(data, rows), data.label, labels)


def with_classes(form: TextForm, label: str | None, labels: Sequence[str]) -> TextForm:
    """The form with the classes of a run, where it has any."""
    return replace(form, classes=Classes(label, tuple(labels))) if labels and label is not None else form


def examples_of(rows: Rows, form: TextForm, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
    """Every usable row as an example of at most `max_length` tokens: with a class where the form has them.

    A row with a class has the tokenizer's own begin and end tokens around it, as a classifier was trained on.

    Raises: as tokenize.
    """
    if form.classes is None:
        return tokenize(rows, form, tokenizer, max_length)
    items, numbers, cut, skipped = list[Example](), list[int](), list[bool](), 0
    for start in range(0, len(rows), CHUNK_ROWS):
        usable: list[tuple[int, str, int]] = []
        for index in range(start, min(start + CHUNK_ROWS, len(rows))):
            try:
                text = "".join(part.text for part in form.segments(rows[index], tokenizer))
                usable.append((index, text, form.classes.number(rows[index])))
            except RowProblem as problem:
                skipped += skip_or_raise(rows, index, problem)
        for (index, _, label), ids, was_cut in zip(usable, *_encoded([text for _, text, _ in usable], tokenizer, max_length), strict=True):
            if not ids:
                skipped += skip_or_raise(rows, index, RowProblem("no token", "a text that has one"))
                continue
            items.append(Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) == len(ids) - 1, label))
            numbers.append(index)
            cut.append(was_cut)
    if not items:
        raise EmptyDataError(
            "no row can be used", where=rows.name, got=f"{counted(skipped, 'row')}, all skipped", expected="at least one usable row",
            do='set on_bad_row = "error" to see what is wrong with them',
        )  # fmt: skip
    return Examples(tuple(items), np.array(numbers, dtype=np.int64), np.array(cut, dtype=bool), skipped, max_length)


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[list[int]], list[bool]]:
    """Token ids with the tokenizer's own frame, and which texts were cut; an end token stays at the end."""
    if not texts:
        return [], []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    whole = tokenizer(list(texts), **options)["input_ids"]
    short = tokenizer(list(texts), truncation=True, max_length=max_length, **options)["input_ids"]
    return list(short), [len(a) > len(b) for a, b in zip(whole, short, strict=True)]


@torch.no_grad()
def evaluate_classes(base: Base, examples: Examples, batch_size: int) -> dict[str, float]:
    """How well a classifier tells these rows: loss (nats per row), accuracy, macro_f1 (both 0 to 1), num_rows."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    total, told, true = 0.0, list[int](), list[int]()
    for start in range(0, len(order), batch_size):
        batch = pad_batch([examples[i] for i in order[start : start + batch_size]], pad_id(base.tokenizer)).to(base.model.device)
        logits_BK = class_logits_BK(base.model, batch)
        total += float(torch.nn.functional.cross_entropy(logits_BK.double(), batch.target_N, reduction="sum"))
        told += logits_BK.argmax(1).tolist()
        true += batch.target_N.tolist()
    told_N, true_N = np.array(told), np.array(true)
    return {
        "loss": total / len(examples), "accuracy": float((told_N == true_N).mean()), "macro_f1": macro_f1(told_N, true_N),
        "num_rows": float(len(examples)),
    }  # fmt: skip


def macro_f1(told_N: np.ndarray, true_N: np.ndarray) -> float:
    """The mean of F1 over all classes that were told or are true.

    >>> macro_f1(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]))
    0.38888888888888884
    """
    scores = []
    for label in np.union1d(told_N, true_N):
        hits = int(((told_N == label) & (true_N == label)).sum())
        scores.append(2 * hits / (int((told_N == label).sum()) + int((true_N == label).sum())))
    return float(np.mean(scores))
