"""Columns by which rows say of themselves that they are not to be trained on. Nothing is left out by itself: such rows are refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from atoll.errors import ConflictError
from atoll.tasks.rows import Rows
from atoll.units import counted

_TRAINED = frozenset({"train", "training"})
_HELD_OUT = frozenset({"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "holdout"})
_NO, _YES = frozenset({"false", "no", "0", "0.0", "n", "f"}), frozenset({"true", "yes", "1", "1.0", "y", "t"})

SPLITS = ("split", "subset", "fold", "set", "partition")
"""Columns that name the split of a row."""
WEIGHTS = ("weight", "loss_weight", "loss_mask", "sample_weight")
"""Columns whose numbers from 0 to 1 would count a row in part, which is not done."""
FLAGS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    **dict.fromkeys(SPLITS, (_TRAINED, _HELD_OUT)),
    **dict.fromkeys(
        ("train", "is_train", "trainable", "use_for_training", "include", *WEIGHTS, "keep", "consent", "consented", "opt_in", "opted_in"),
        (_YES, _NO),
    ),
    **dict.fromkeys(
        ("do_not_train", "no_train", "exclude", "excluded", "ignore", "skip", "held_out", "is_test", "is_validation", "opt_out",
         "opted_out", "deleted", "is_deleted", "removed", "is_removed", "discard", "discarded"), (_NO, _YES)
    ),
}  # fmt: skip
"""By column: words that say that a row is for training, and those that say that it is not. With others, it means something else."""


def check_flags(rows: Rows, used: Collection[str]) -> None:
    """Whether training rows say, in a column that nothing uses, that they are not for training.

    Raises: ConflictError naming the first of them.
    """
    for column in rows.columns:
        if column.lower() not in FLAGS or column in used:
            continue
        marked = _marked(column.lower(), [None if value is None else str(value).strip().lower() for value in rows.column(column)])
        if marked:
            raise ConflictError(
                "rows say that they are not to be trained on", where=f"{rows.where(marked[0])}, column {column}",
                got=f"{rows.column(column)[marked[0]]!r}; {len(marked)} of {counted(len(rows), 'row')} like it",
                expected="rows to train on",
                do="put these rows elsewhere (held-out ones into a file of their own, for [data] eval); if the column means something "
                "else, name it otherwise or take it out",
            )  # fmt: skip


def _marked(column: str, words: Sequence[str | None]) -> list[int]:
    """Rows that the column marks; none where its words show that it means something else."""
    says_yes, says_no = FLAGS[column]
    if column in SPLITS:  # A split's parts have names behind it: train-clean, test_unseen.
        words = [None if word is None else re.split(r"[\W_]+", re.sub(r"held\W?out", "heldout", word))[0] for word in words]
    said = {word for word in words if word is not None}
    if column in WEIGHTS and all(_is_share(word) for word in said) and (len(said) > 1 or said & _NO):
        return [number for number, word in enumerate(words) if word is not None and float(word) != 1]
    if said <= says_yes | says_no or (column in SPLITS and said & _TRAINED):
        return [number for number, word in enumerate(words) if word in says_no]
    return []


def _is_share(word: str) -> bool:
    try:
        return 0 <= float(word) <= 1
    except ValueError:
        return False
