"""A value of a row as a class."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from atoll.errors import BadValueError
from atoll.tasks.forms.values import as_text, check_alike, class_of, in_order
from atoll.tasks.rows import RowProblem, Rows, load_rows


def read(folder: Path, how: str) -> Rows:
    """Three rows of a data set with names of classes, written in a way that keeps them."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    whole = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [1, 0, -1]}, features=features)
    if how == "saved":
        whole.save_to_disk(folder / "d")
        return load_rows("d", base_dir=folder, limit=None, on_bad_row="error")
    if how == "parquet":
        whole.to_parquet(folder / "d.parquet")
        return load_rows("d.parquet", base_dir=folder, limit=None, on_bad_row="error")
    whole.save_to_disk(folder / "d")
    next((folder / "d").glob("*.arrow")).rename(folder / "d.arrow")
    return load_rows("d.arrow", base_dir=folder, limit=None, on_bad_row="error")


@pytest.mark.parametrize("how", ["saved", "parquet", "arrow"])
def test_a_class_has_the_name_that_datasets_gives_it_and_no_class_is_none(tmp_path: Path, how: str) -> None:
    rows = read(tmp_path, how)
    assert [class_of(rows[n], "label") for n in range(2)] == ["pos", "neg"]
    assert [as_text(rows[n], "label") for n in range(3)] == ["1", "0", "-1"], "as `datasets` and every template have it"
    with pytest.raises(RowProblem):
        class_of(rows[2], "label")


@pytest.mark.parametrize(
    ("found", "wanted"),
    [(["10", "9", "0"], ("0", "9", "10")), (["-1", "1"], ("-1", "1")), (["b", "a"], ("a", "b")), (["10", "9", "x"], ("10", "9", "x"))],
)
def test_whole_numbers_are_in_their_order(found: list[str], wanted: tuple[str, ...]) -> None:
    assert in_order(found) == wanted


@pytest.mark.parametrize("alike", [("True", "1"), ("0", "false"), ("True", "true"), ("1", "1.0"), ("pos", "Pos"), ("a b", "a  b")])
def test_classes_that_are_one_written_in_two_ways(alike: tuple[str, str]) -> None:
    with pytest.raises(BadValueError):
        check_alike(alike, "label")
    check_alike(("True", "False"), "label")
    check_alike(("0", "1"), "label")
