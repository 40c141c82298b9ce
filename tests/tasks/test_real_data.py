"""The real data sets, where they are at hand: every one loads and becomes tokens as it would in a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from atoll.base.load import load_base
from atoll.config.schema import Data, Evaluate
from atoll.errors import DataFileError
from atoll.tasks.evaluate import evaluate
from atoll.tasks.partition import partition
from atoll.tasks.rows import load_rows
from atoll.tasks.text import text_form
from atoll.tasks.tokens import tokenize

NEWS = Data(prompt="{text:.600}\nGroup:", completion=" {label}")
QUIZ = Data(prompt="{instruction}\n", completion="the correct answer is {answer}")
SETS = {
    "e2e/trainset.csv": (Data(), 42061, ("mr", "ref")),
    "e2e/devset.csv": (Data(prompt="{mr} ->", completion=" {ref}"), 4672, ("mr", "ref")),
    "20news/20news.jsonl.gz": (NEWS, 19997, ("label", "id", "text")),
    "alpaca/alpaca_5000.json": (Data(), 5000, ("instruction", "input", "output")),
    "commonsense/ARC-Easy/train.json": (QUIZ, 2251, ("instruction", "input", "output", "answer")),
    "commonsense/ARC-Challenge/test.json": (QUIZ, 1172, ("instruction", "input", "output", "answer")),
    "commonsense/openbookqa": (QUIZ, 4957, ("instruction", "input", "output", "answer")),
    "commonsense/piqa/test.json": (QUIZ, 1838, ("instruction", "input", "output", "answer")),
    "commonsense/winogrande/test.json": (Data(), 1267, ("instruction", "input", "output", "answer")),
}


@pytest.mark.parametrize("source", SETS)
@pytest.mark.parametrize("model", ["stories260K", "house-4M"])
def test_it_loads_and_becomes_tokens(shared: Path, source: str, model: str) -> None:
    data, num_rows, columns = SETS[source]
    rows = load_rows(source, base_dir=shared / "data", limit=None, on_bad_row="skip")
    assert (len(rows), rows.columns, rows.num_skipped) == (num_rows, columns, 0)
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    examples = tokenize(rows.take(range(40)), text_form(data, rows.columns), tokenizer, 2048)
    assert (len(examples), examples.num_truncated) == (40, 0)
    for example in examples:
        first = int(np.flatnonzero(example.loss_mask)[0])
        assert first > 0
        assert example.loss_mask[first:].all()
        assert example.token_ids[-1] == tokenizer.eos_token_id
        assert (example.token_ids[0] == tokenizer.bos_token_id) == (model == "stories260K")


def test_e2e_lines_lengths_and_folder(shared: Path) -> None:
    rows = load_rows("e2e/devset.csv", base_dir=shared / "data", limit=1000, on_bad_row="error")
    assert rows.where(2) == "e2e/devset.csv, line 4"
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    examples = tokenize(rows, text_form(Data(), rows.columns), tokenizer, 256)
    lengths = [len(example) for example in examples]
    assert 120 < np.median(lengths) < 200
    assert examples.num_truncated < 10
    with pytest.raises(DataFileError) as caught:
        load_rows("e2e", base_dir=shared / "data", limit=None, on_bad_row="error")
    assert caught.value.where == "e2e/devset.csv", "not trained on by its name, which `datasets` does not know"


def test_news_by_group(shared: Path) -> None:
    rows = load_rows("20news/20news.jsonl.gz", base_dir=shared / "data", limit=None, on_bad_row="error")
    shares = partition(rows, "by:label", ["sci.space", "north", "south"], 0)
    labels = np.array(rows.column("label"))
    assert {"sci.space"} <= set(labels[shares[0]])
    assert sum(map(len, shares)) == len(rows)


def test_multiple_choice_by_label_likelihood(shared: Path) -> None:
    base = load_base(str(shared / "models" / "house-4M"))
    rows = load_rows("commonsense/ARC-Easy/test.json", base_dir=shared / "data", limit=24, on_bad_row="error")
    settings = Evaluate(metrics=("label_accuracy",), labels=("answer1", "answer2", "answer3", "answer4"), batch_size=8)
    result = evaluate(base, rows, text_form(QUIZ, rows.columns), settings, max_length=512)
    assert result["num_rows"] == 24
    assert 0 <= result["label_accuracy"] <= 1
    assert 0 < result["loss"] < 10
