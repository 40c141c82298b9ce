"""Columns by which rows say of themselves that they are not to be trained on. Nothing is left out by itself: such rows are refused."""

from __future__ import annotations

from collections.abc import Collection

from atoll.errors import ConflictError
from atoll.tasks.rows import Rows

_TRAINED = frozenset({"train", "training"})
_HELD_OUT = frozenset({"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "held-out", "heldout", "holdout"})
_NO, _YES = frozenset({"false", "no", "0", "0.0", "n", "f"}), frozenset({"true", "yes", "1", "1.0", "y", "t"})

FLAGS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    **dict.fromkeys(("split", "subset", "fold", "set", "partition"), (_TRAINED, _HELD_OUT)),
    **dict.fromkeys(
        ("train", "is_train", "trainable", "use_for_training", "include", "weight", "loss_weight", "sample_weight", "keep"), (_YES, _NO)
    ),
    **dict.fromkeys(
        ("do_not_train", "exclude", "excluded", "ignore", "skip", "held_out", "is_test", "is_validation", "opt_out"), (_NO, _YES)
    ),
}  # fmt: skip
"""By column: words that say that a row is for training, and those that say that it is not. With others, it means something else."""


def check_flags(rows: Rows, used: Collection[str]) -> None:
    """Whether training rows say, in a column that nothing uses, that they are not for training.

    Raises: ConflictError naming the first of them.
    """
    for column in rows.columns:
        says_yes, says_no = FLAGS.get(column.lower(), (frozenset(), frozenset()))
        if not says_no or column in used:
            continue
        words = [None if value is None else str(value).strip().lower() for value in rows.column(column)]
        marked = [number for number, word in enumerate(words) if word in says_no]
        if marked and {word for word in words if word is not None} <= says_yes | says_no:
            raise ConflictError(
                "rows say that they are not to be trained on", where=f"{rows.where(marked[0])}, column {column}",
                got=f"{rows.column(column)[marked[0]]!r}; {len(marked)} of {len(rows)} rows like it", expected="rows to train on",
                do="put these rows elsewhere (held-out ones into a file of their own, for [data] eval); if the column means something "
                "else, name it otherwise or take it out",
            )  # fmt: skip
