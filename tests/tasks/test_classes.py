"""Rows with classes as examples and batches, and the scores of a classifier."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from atoll.config.schema import Data
from atoll.errors import BadRowError, ConflictError, EmptyDataError
from atoll.tasks import classes
from atoll.tasks.batches import pad_batch
from atoll.tasks.classes import examples_of, form_of, macro_f1
from atoll.tasks.rows import Rows, load_rows

from tests.classifiers import save_bert_folder

LABELS = ("no", "yes")


def rows_of(folder: Path, *values: dict[str, object], on_bad_row: str = "error") -> Rows:
    (folder / "rows.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return load_rows("rows.jsonl", base_dir=folder, limit=None, on_bad_row=on_bad_row)  # type: ignore[arg-type]


def test_a_row_has_the_tokenizers_frame_and_keeps_it_when_it_is_cut(tmp_path: Path) -> None:
    save_bert_folder(tmp_path)
    rows = rows_of(tmp_path, {"text": "w1 w2", "spam": "yes"}, {"text": "w1 w2 w3 w4 w5", "spam": "no"})
    found = examples_of(rows, form_of(Data(label="spam"), rows, LABELS), AutoTokenizer.from_pretrained(tmp_path), 5)
    assert [example.token_ids.tolist() for example in found] == [[1, 4, 5, 2], [1, 4, 5, 6, 2]]
    assert [example.label for example in found] == [1, 0]
    assert (found.num_truncated, found.num_label_tokens, found.num_skipped) == (1, 2, 0)
    batch = pad_batch(found, pad_id=0)
    assert batch.predict_N.tolist() == [3, 9], "the last real token of each row"
    assert batch.target_N.tolist() == [1, 0]
    assert batch.lengths == (4, 5)


def test_rows_without_a_class_or_a_token_are_refused_or_skipped(tmp_path: Path) -> None:
    save_bert_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    good = {"text": "w1", "spam": "yes"}
    for bad in ({"text": "w1", "spam": "maybe"}, {"text": "w1", "spam": None}, {"text": None, "spam": "no"}):
        rows = rows_of(tmp_path, good, bad)
        with pytest.raises(BadRowError):
            examples_of(rows, form_of(Data(label="spam"), rows, LABELS), tokenizer, 8)
        rows = rows_of(tmp_path, good, bad, on_bad_row="skip")
        found = examples_of(rows, form_of(Data(label="spam"), rows, LABELS), tokenizer, 8)
        assert (len(found), found.num_skipped) == (1, 1)
    rows = rows_of(tmp_path, {"text": "w1", "spam": "maybe"}, on_bad_row="skip")
    with pytest.raises(EmptyDataError):
        examples_of(rows, form_of(Data(label="spam"), rows, LABELS), tokenizer, 8)


def test_rows_without_a_text_column_need_a_template(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"prompt": "w1", "completion": "w2", "spam": "yes"})
    with pytest.raises(ConflictError, match="which text"):
        form_of(Data(label="spam"), rows, LABELS)
    assert form_of(Data(label="spam", text="{prompt}"), rows, LABELS).classes is not None
    assert form_of(Data(), rows, ()).classes is None
    rows = rows_of(tmp_path, {"spam": "yes", "id": 7, "sentence": "w1"})
    with pytest.raises(ConflictError, match="which text") as caught:
        form_of(Data(label="spam"), rows, LABELS)
    assert 'text = "{sentence}"' in caught.value.do


def test_macro_f1_is_the_mean_over_classes_that_occur() -> None:
    """By hand: of class 0 precision 1/2 and recall 1, of 1 precision 1 and recall 1/3, of 2 nothing right."""
    told, true = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    by_hand = np.mean([2 * 0.5 * 1 / 1.5, 2 * 1 * (1 / 3) / (4 / 3), 0.0])
    assert macro_f1(told, true) == pytest.approx(by_hand)
    assert macro_f1(true, true) == 1.0
    assert doctest.testmod(classes).failed == 0
