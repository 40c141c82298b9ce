"""Rows that say of themselves that they are not to be trained on."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from atoll.errors import ConflictError
from atoll.tasks.forms.flags import FLAGS, check_flags
from atoll.tasks.rows import Rows

RowsOf = Callable[..., Rows]
SAID: dict[str, tuple[str, list[object], str]] = {
    "splits of many parts": ("split", ["train-clean", "train", "test_unseen"], "'test_unseen'; 1 of 3"),
    "in capitals": ("Split", ["Train", "Test", None], "'Test'; 1 of 3"),
    "with a split that nobody knows": ("split", ["train", "unlabeled", "held-out"], "'held-out'; 1 of 3"),
    "nothing but held out": ("fold", ["dev", "dev"], "2 of 2"),
    "folds by number": ("fold", [0, 1, 2], ""),
    "sets of something else": ("set", ["dev", "prod"], ""),
    "a partition by name": ("partition", ["north", "test"], ""),
    "shares": ("weight", [1.0, 0.5], "0.5; 1 of 2"),
    "ones": ("weight", [1.0, 1, "1"], ""),
    "all alike": ("weight", [0.5, 0.5], ""),
    "nothing but zeros": ("weight", [0, 0.0], "0; 2 of 2"),
    "kilograms": ("weight", [0, 0.5, 12], ""),
    "yes and no": ("consent", ["Yes", "No"], "'No'; 1 of 2"),
    "a word of its own": ("consent", ["yes", "withdrawn", "no"], ""),
    "true and null": ("deleted", [None, True], "True; 1 of 2"),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_a_column_says_of_its_rows(rows_of: RowsOf, kind: str) -> None:
    column, values, refused = SAID[kind]
    rows = rows_of("".join(json.dumps({"text": "a", column: value}) + "\n" for value in values), "rows.jsonl")
    if not refused:
        check_flags(rows, {"text"})
        return
    with pytest.raises(ConflictError) as caught:
        check_flags(rows, {"text"})
    assert refused in caught.value.got
    check_flags(rows, {"text", column})


@pytest.mark.parametrize("column", FLAGS)
def test_every_flag_has_a_word_that_refuses(rows_of: RowsOf, column: str) -> None:
    for word in FLAGS[column][1]:
        with pytest.raises(ConflictError):
            check_flags(rows_of(json.dumps({"text": "a", column: word}) + "\n", "rows.jsonl"), {"text"})
    for word in FLAGS[column][0]:
        check_flags(rows_of(json.dumps({"text": "a", column: word}) + "\n", "rows.jsonl"), {"text"})
