"""Good data in every form gives the same rows, each knowing its place."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.errors import BadRowError, DataFileError
from atoll.tasks.rows import Rows, load_rows

WANTED = [{"mr": "name[A]", "ref": 'He said "yes",\nthen left.'}, {"mr": "2020-01-01", "ref": "NA"}, {"mr": "café", "ref": "007"}]
CSV = 'mr,ref\nname[A],"He said ""yes"",\nthen left."\n2020-01-01,NA\n\ncafé,"007"\n'
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in WANTED) + "\n"
RowsOf = Callable[..., Rows]


def listed(rows: Rows) -> list[dict[str, object]]:
    return [dict(rows[i]) for i in range(len(rows))]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.csv", CSV, ("line 2", "line 4", "line 6")),
        ("a.csv", "\ufeff" + CSV.replace("\n", "\r\n"), None),
        ("a.jsonl", JSONL, ("line 1", "line 2", "line 3")),
        ("a.jsonl", "\n" + JSONL, ("line 2", "line 3", "line 4")),
        ("a.json", json.dumps(WANTED), ("line 1", "line 1", "line 1")),
        ("a.json", json.dumps(WANTED, indent=1), ("line 2", "line 6", "line 10")),
        ("a.json", JSONL, ("line 1", "line 2", "line 3")),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0), ("line 2", "line 4", "line 6")),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0), ("line 1", "line 2", "line 3")),
    ],
)
def test_every_form_gives_the_same_rows(rows_of: RowsOf, name: str, content: str | bytes, places: tuple[str, ...] | None) -> None:
    rows = rows_of(content, name)
    wanted = [{k: v.replace("\n", "\r\n") if places is None else v for k, v in row.items()} for row in WANTED]
    assert listed(rows) == wanted
    assert rows.columns == ("mr", "ref")
    assert places is None or tuple(rows.where(i) for i in range(3)) == tuple(f"{name}, {place}" for place in places)


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(WANTED), tmp_path / "a.parquet")
    rows = load_rows("a.parquet", base_dir=tmp_path, limit=2, on_bad_row="error")
    assert listed(rows) == WANTED[:2]
    assert rows.where(1) == "a.parquet, row 2"


def test_json_values_stay_as_they_are_written(rows_of: RowsOf) -> None:
    """pyarrow alone would make dates of texts, 1.0 of 1, and fill objects up with nulls."""
    wanted = [
        {"day": "2020-01-01", "n": 1, "m": [{"a": "x"}]},
        {"day": "2021-01-01", "n": 1.5, "m": [{"b": "y"}]},
        {"day": "late", "n": "no", "m": []},
    ]
    assert listed(rows_of("\n".join(map(json.dumps, wanted)), "a.jsonl")) == wanted


def test_a_column_may_appear_late(rows_of: RowsOf) -> None:
    rows = rows_of('{"a": "1"}\n{"b": "2"}\n', "a.jsonl")
    assert listed(rows) == [{"a": "1", "b": None}, {"a": None, "b": "2"}]


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "b.csv").write_text("text,id\nsecond,2\n")
    (tmp_path / "shards" / "a.jsonl").write_text('{"id": "1", "text": "first"}\n')
    (tmp_path / "shards" / "README.md").write_text("not data")
    rows = load_rows("shards", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert [row["text"] for row in listed(rows)] == ["first", "second"]
    assert [rows.where(i) for i in range(2)] == ["shards/a.jsonl, line 1", "shards/b.csv, line 2"]


@pytest.mark.parametrize(
    ("name", "content", "kept", "skipped"),
    [
        ("a.csv", "a,b\n1,2\nlonely\n3,4\n5,6,7\n", ["1", "3"], 2),
        ("a.csv", 'a,b\n1,2\n"open\n3,4\n5,6\n', ["1"], 1),
        ("a.jsonl", '{"a": "1"}\n{"a": \n[1]\n{"a": "3"}\n"x"\n', ["1", "3"], 3),
        ("a.json", '[{"a": "1"}, 7, {"a": "3"}, null]', ["1", "3"], 2),
    ],
)
def test_skip_counts_what_it_leaves_out(rows_of: RowsOf, name: str, content: str, kept: list[str], skipped: int) -> None:
    rows = rows_of(content, name, on_bad_row="skip")
    assert [rows[i]["a"] for i in range(len(rows))] == kept
    assert rows.num_skipped == skipped
    assert rows.where(len(rows) - 1).endswith(
        {"a.csv": "line 4" if len(kept) > 1 else "line 2", "a.jsonl": "line 4", "a.json": "line 1"}[name]
    )


def test_an_open_quote_does_not_swallow_the_file(rows_of: RowsOf) -> None:
    with pytest.raises(BadRowError) as caught:
        rows_of('a,b\n1,2\n3,"open\n5,6\n')
    assert caught.value.where == "rows.csv, line 3"


def test_take_and_limit_keep_places(rows_of: RowsOf) -> None:
    rows = rows_of("text\na\nb\nc\nd\n")
    some = rows.take([3, 1])
    assert listed(some) == [{"text": "d"}, {"text": "b"}]
    assert some.where(0) == "rows.csv, line 5"
    assert len(rows_of("text\na\nb\nc\n", limit=2)) == 2


def test_a_hub_id_goes_through_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        assert config is revision is None
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["a", "b", "c"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows("org/name:test", base_dir=tmp_path, limit=2, on_bad_row="error")
    assert listed(rows) == [{"text": "a"}, {"text": "b"}]
    assert rows.where(1) == "org/name:test, row 2"
    load_rows("squad", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert asked == [("org/name", "test"), ("squad", "train")]


@pytest.mark.parametrize("problem", [ConnectionError("offline"), FileNotFoundError("no such data set"), ValueError("Unknown split")])
def test_a_hub_that_refuses_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problem: Exception) -> None:
    import datasets

    def refuse(name: str, config: str | None, split: str, revision: str | None) -> None:
        raise problem

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataFileError) as caught:
        load_rows("org/name", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert caught.value.where == "org/name"
    assert str(problem) in caught.value.got
    assert caught.value.do


def test_text_files_need_neither_datasets_nor_pyarrow(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "a.csv").write_text("text\nx\n")
    code = (
        "import sys; from pathlib import Path; from atoll.tasks import partition; from atoll.tasks.scoring import builtin_metrics; "
        "from atoll.tasks.rows import load_rows;"
        "from atoll.tasks.text import text_form;"
        f"load_rows('a.csv', base_dir=Path({str(tmp_path)!r}), limit=None, on_bad_row='error');"
        "print([name for name in ('datasets', 'pandas', 'pyarrow', 'torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_demo_brings_its_own_held_out_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from atoll import embedded

    for split in ("train", "eval"):
        (tmp_path / f"{split}.csv").write_text(f"owner,mr,ref\nnorth,a,{split}\n")
    monkeypatch.setattr(embedded, "demo_path", lambda split: tmp_path / f"{split}.csv")
    train, held_out = (
        load_rows(source, base_dir=tmp_path / "elsewhere", limit=None, on_bad_row="error") for source in ("demo", "demo-eval")
    )
    assert (train[0]["ref"], held_out[0]["ref"]) == ("train", "eval")
    assert train.where(0) == "demo, line 2"
