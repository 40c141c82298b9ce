"""What people bring as data: each form is read as the library reads it, or refused by name; a small file never fills the memory."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.errors import BadRowError, DataFileError, InputError
from atoll.tasks.forms.values import as_text
from atoll.tasks.readers.reader import MOST_COLUMNS, Limits
from atoll.tasks.rows import RowProblem, Rows, files_of, load_rows

ROWS = [{"prompt": "a b", "completion": "1.10"}, {"prompt": "c\nd", "completion": "é, ; |"}]
SMALL = Limits(file_bytes=100_000, row_bytes=10_000)


def listed(rows: Rows) -> list[dict[str, object]]:
    return [dict(rows[i]) for i in range(len(rows))]


def separated(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zipped(data: bytes, *names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    out = io.BytesIO()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
        stream.flush()
        stream.close()
        return out.getvalue() if not out.closed else b""


def parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def arrow(*, footer: bool) -> bytes:
    table, out = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    with (pa.ipc.new_file if footer else pa.ipc.new_stream)(out, table.schema) as writer:
        writer.write_table(table)
    return bytes(out.getvalue())


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FORMS = {
    "commas": ("a.csv", separated(","), ""), "semicolons": ("a.csv", separated(";"), "semicolons"),
    "tabs in a .csv": ("a.csv", separated("\t"), "tabs"), "bars": ("a.csv", separated("|"), "vertical bars"),
    "tsv": ("a.tsv", separated("\t"), ""), "tab": ("a.TAB", separated("\t"), ""), "jsonl": ("a.jsonl", JSONL, ""),
    "ndjson": ("a.ndjson", JSONL, ""), "json": ("a.json", json.dumps(ROWS).encode(), ""), "lines in a .json": ("a.json", JSONL, ""),
    "parquet": ("a.parquet", parquet(pa.Table.from_pylist(ROWS)), ""), "arrow stream": ("a.arrow", arrow(footer=False), ""),
    "arrow file": ("a.arrow", arrow(footer=True), ""),
}  # fmt: skip
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda data: bytes(pa.compress(data, "zstd")),
    ".zip": lambda data: zipped(data, "inside"),
}  # fmt: skip


def write(folder: Path, name: str, data: bytes | str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return name


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_packed_in_every_way(tmp_path: Path, form: str, packed: str) -> None:
    name, data, note = FORMS[form]
    rows = load_rows(write(tmp_path, name + packed, PACKERS[packed](data)), base_dir=tmp_path, limit=None, on_bad_row="error")
    assert listed(rows) == ROWS
    assert (note in rows.notes[0]) if note else not rows.notes
    assert name in rows.where(1)


TRAIN = '{"text": "train"}\n'
OTHER = '{"text": "other"}\n'
FOLDERS = {
    "plain files": ["b.jsonl", "a.jsonl"],
    "files below": ["a.jsonl", "more/b.jsonl", "more/deep/c.jsonl"],
    "named files": ["train.jsonl", "validation.jsonl", "test.jsonl"],
    "shards": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"],
    "shards in data": ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "data/extra-00000-of-00001.jsonl"],
    "folders of splits": ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "dev/a.jsonl"],
    "synonyms": ["training.jsonl", "dev.jsonl", "eval.jsonl"],
    "with a prefix": ["my-train.jsonl", "my-test.jsonl"],
    "a word that only begins so": ["trained.jsonl", "contest.jsonl", "b.jsonl"],
    "hidden and special": ["a.jsonl", ".hidden.jsonl", "__pycache__/b.jsonl"],
    "a split and a file without one": ["train.jsonl", "b.jsonl"],
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_has_the_training_rows_that_datasets_gives_it(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in FOLDERS[kind]:
        write(tmp_path / "d", name, json.dumps({"text": name}) + "\n")
    wanted = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    rows = load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert sorted(rows.column("text")) == sorted(wanted["train"]["text"])
    for split in wanted:
        named = load_rows(f"d:{split}", base_dir=tmp_path, limit=None, on_bad_row="error")
        assert sorted(named.column("text")) == sorted(wanted[split]["text"])
    unread = {name for name in FOLDERS[kind] if not Path(name).name.startswith(".") and "__" not in name} - set(rows.column("text"))
    assert all(any(name in note for note in rows.notes) for name in unread), "what is not read is told"


def test_a_readme_names_the_files_of_a_split(tmp_path: Path) -> None:
    write(tmp_path, "d/README.md", "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: x/*.jsonl\n---\n")
    write(tmp_path, "d/x/a.jsonl", TRAIN)
    write(tmp_path, "d/train.jsonl", OTHER)
    rows = load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert (listed(rows), rows.notes) == ([{"text": "train"}], ("of d not read: train.jsonl",))


def test_a_folder_without_a_training_split(tmp_path: Path) -> None:
    write(tmp_path, "d/test.jsonl", OTHER)
    write(tmp_path, "d/a.jsonl", OTHER)
    with pytest.raises(DataFileError) as caught:
        load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert (caught.value.got, caught.value.expected) == ("train", "one of test")


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], ["validation.jsonl"]), (["train.jsonl", "test.jsonl"], ["test.jsonl"]),
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]), (["train.jsonl"], ["train.jsonl"]),
    ],
)  # fmt: skip
def test_held_out_rows_of_a_folder_are_its_held_out_split(tmp_path: Path, names: list[str], read: list[str]) -> None:
    for name in names:
        write(tmp_path, f"d/{name}", OTHER)
    found = files_of("d", base_dir=tmp_path, reader="auto", role="eval")
    assert [path.name for path in found] == read


def test_held_out_files_are_never_trained_on(tmp_path: Path) -> None:
    write(tmp_path, "d/a.jsonl", TRAIN)
    write(tmp_path, "d/b.jsonl", OTHER)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "d" / "b.jsonl")
    held_out = files_of("link.jsonl", base_dir=tmp_path, reader="auto", role="eval")
    rows = load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error", held_out=held_out)
    assert (listed(rows), rows.notes) == ([{"text": "train"}], ("not trained on, as it is held out: d/b.jsonl",))
    write(tmp_path, "copy.jsonl", OTHER)
    copied = files_of("copy.jsonl", base_dir=tmp_path, reader="auto", role="eval")
    assert listed(load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error", held_out=copied)) == [{"text": "train"}]
    (tmp_path / "d" / "a.jsonl").unlink()
    assert "by heart" in load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error", held_out=held_out).notes[0]


@pytest.mark.parametrize("name", ["Test.jsonl", "TEST/b.jsonl", "my-Holdout.jsonl", "held_out.jsonl", "held-out-rows.jsonl", "Dev.jsonl"])
def test_a_name_that_datasets_does_not_know_as_held_out_is_not_trained_on(tmp_path: Path, name: str) -> None:
    write(tmp_path, "d/a.jsonl", TRAIN)
    write(tmp_path, f"d/{name}", OTHER)
    with pytest.raises(DataFileError) as caught:
        load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert caught.value.where == f"d/{name}"
    rows = load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error", held_out=(tmp_path / "d" / name,))
    assert rows.column("text") == ["train"], "said to be held out, it is no riddle"


def test_a_readme_names_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "d/README.md", "---\nconfigs:\n- config_name: a\n  data_dir: x\n---\n")
    write(tmp_path, "d/x/a.jsonl", TRAIN)
    write(tmp_path, "d/a.jsonl", OTHER)
    assert load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error").column("text") == ["train"]


@pytest.mark.parametrize("card", ["configs: [", "configs: 3", "configs:\n- data_files: 7"])
def test_a_broken_readme_hides_no_split(tmp_path: Path, card: str) -> None:
    write(tmp_path, "d/README.md", f"---\n{card}\n---\n")
    write(tmp_path, "d/a.jsonl", TRAIN)
    with pytest.raises(DataFileError):
        load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error")


def test_an_archive_is_read_by_the_name_of_what_is_in_it(tmp_path: Path) -> None:
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / "archive.zip").write_bytes(zipped(separated(delimiter), name))
        assert listed(load_rows("archive.zip", base_dir=tmp_path, limit=None, on_bad_row="error")) == ROWS
    (tmp_path / "archive.zip").write_bytes(zipped(separated(","), "a.csv", "b.csv"))
    with pytest.raises(DataFileError) as caught:
        load_rows("archive.zip", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert "several files" in caught.value.got


def test_a_slice_of_a_split_is_named(tmp_path: Path) -> None:
    write(tmp_path, "d/train.jsonl", TRAIN)
    for source in ("d:train[:10%]", "org/name:train[:10%]"):
        with pytest.raises(DataFileError) as caught:
            load_rows(source, base_dir=tmp_path, limit=None, on_bad_row="error")
        assert caught.value.got == "[:10%]"


def test_what_save_to_disk_writes(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.select([1, 0]).save_to_disk(tmp_path / "one")
    assert listed(load_rows("one", base_dir=tmp_path, limit=None, on_bad_row="error")) == ROWS[::-1]
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "two")
    assert listed(load_rows("two", base_dir=tmp_path, limit=None, on_bad_row="error")) == ROWS
    assert listed(load_rows("two", base_dir=tmp_path, limit=None, on_bad_row="error", role="eval")) == ROWS[1:]
    assert listed(load_rows("two:test", base_dir=tmp_path, limit=None, on_bad_row="error")) == ROWS[1:]
    with pytest.raises(DataFileError, match="no such split"):
        load_rows("two:dev", base_dir=tmp_path, limit=None, on_bad_row="error")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataFileError, match="saved data set"):
        load_rows("one", base_dir=tmp_path, limit=None, on_bad_row="error")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two configs, found as an id is: `datasets` looks in the current folder, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    card = "---\nconfigs:\n- config_name: main\n  data_files: main/*.jsonl\n- config_name: other\n  data_files:\n  - split: train\n"
    write(tmp_path, "org/name/README.md", card + "    path: other/a.jsonl\n  - split: test\n    path: other/b.jsonl\n---\n")
    for name in ("main/a", "other/a", "other/b"):
        write(tmp_path, f"org/name/{name}.jsonl", json.dumps({"text": name}) + "\n")
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


@pytest.mark.parametrize(
    ("source", "role", "text"),
    [("org/name:main", "train", "main/a"), ("org/name:other:test", "train", "other/b"), ("org/name:other", "eval", "other/b")],
)  # fmt: skip
def test_a_data_set_has_configs_and_splits(hub: Path, source: str, role: str, text: str) -> None:
    rows = load_rows(source, base_dir=hub, limit=None, on_bad_row="error", role=role)  # type: ignore[arg-type]
    assert listed(rows) == [{"text": text}]


@pytest.mark.parametrize(
    ("source", "role", "text"),
    [("name:main", "train", "main/a"), ("name:other:test", "train", "other/b"), ("name:other", "eval", "other/b")],
)  # fmt: skip
def test_a_folder_has_configs_and_splits_as_well(hub: Path, source: str, role: str, text: str) -> None:
    rows = load_rows(source, base_dir=hub.parent / "org", limit=None, on_bad_row="error", role=role)  # type: ignore[arg-type]
    assert listed(rows) == [{"text": text}]


@pytest.mark.parametrize(("source", "got"), [("org/name", "main"), ("org/name:another", "main"), ("org/name:other:dev", "dev")])
def test_a_config_or_split_that_is_not_there(hub: Path, source: str, got: str) -> None:
    for base_dir in (hub, hub.parent):  # As a data set id, and as a folder.
        with pytest.raises(DataFileError) as caught:
            load_rows(source, base_dir=base_dir, limit=None, on_bad_row="error")
        assert got in caught.value.got + caught.value.expected


def test_a_revision_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("org/name@v1.2", "org/name@refs/convert/parquet:en:test", "org/name@0a1b:test"):
        load_rows(source, base_dir=tmp_path, limit=None, on_bad_row="error")
    wanted = [(None, "train", "v1.2"), ("en", "test", "refs/convert/parquet"), (None, "test", "0a1b")]
    assert asked == [("org/name", *one) for one in wanted]


def bomb(table: pa.Table) -> bytes:
    data = parquet(table)
    assert len(data) < SMALL.file_bytes / 2
    return data


SAME = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * 1000]))
LARGE = {
    "gz": ("a.jsonl.gz", gzip.compress(JSONL * 10_000)), "zst": ("a.jsonl.zst", bytes(pa.compress(JSONL * 10_000, "zstd"))),
    "xz of a list": ("a.json.xz", lzma.compress(b"[" + b" " * 10**6 + b"]")), "list": ("a.json", b"[" + b" " * 10**6 + b"]"),
    "packed Parquet": ("a.parquet.gz", gzip.compress(b"\0" * 10**6)), "packed Arrow": ("a.arrow.zip", zipped(b"\0" * 10**6, "a")),
    "plain": ("a.csv", b"a,b\n" + b"1,2\n" * 30_000),
    "parquet": ("a.parquet", bomb(pa.table({"text": ["x" * 1000] * 3000}))), "dictionary": ("a.parquet", bomb(pa.table({"text": SAME}))),
    "parquet of nothing": ("a.parquet", bomb(pa.table({"text": pa.nulls(100_000)}))),
    "parquet of lists": ("a.parquet", bomb(pa.table({"text": [["x" * 1000] * 10] * 300}))),
    "a key for each row": ("a.jsonl", "".join(f'{{"k{i}": 1}}\n' for i in range(2000)).encode()),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_file_that_unpacks_into_more_than_allowed(tmp_path: Path, kind: str, on_bad_row: str) -> None:
    with pytest.raises(DataFileError) as caught:
        load_rows(write(tmp_path, *LARGE[kind]), base_dir=tmp_path, limit=None, on_bad_row=on_bad_row, limits=SMALL)  # type: ignore[arg-type]
    assert "largest_file" in caught.value.do


WIDE = [f"c{i}" for i in range(MOST_COLUMNS + 1)]
COLUMNS = {
    "csv": ("a.csv", ",".join(WIDE) + "\n" + ",".join(WIDE)), "jsonl": ("a.jsonl", json.dumps(dict.fromkeys(WIDE, 1))),
    "parquet": ("a.parquet", parquet(pa.table({name: [1] for name in WIDE}))),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLUMNS)
def test_too_many_columns(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataFileError) as caught:
        load_rows(write(tmp_path, *COLUMNS[kind]), base_dir=tmp_path, limit=None, on_bad_row="error")
    assert len(caught.value.page()) < 500


GOOD = '{"a": "good"}'
LONG = '{"a": "' + "x" * SMALL.row_bytes + '"}'
DEEP = '{"a": ' + "[" * 4000 + "]" * 4000 + "}"
BAD_ROWS = {
    "long line": ("a.jsonl", f"{GOOD}\n{LONG}\n{GOOD}\n", "line 2"), "long item": ("a.json", f"[{GOOD},\n{LONG},\n{GOOD}]", "line 2"),
    "long value": ("a.csv", f"a\ngood\n{LONG}\ngood\n", "line 3"), "long quoted value": ("a.csv", f'a\ngood\n"{LONG}"\ngood\n', "line 3"),
    "rather deep line": ("a.jsonl", f'{GOOD}\n{{"a": {"[" * 200}{"]" * 200}}}\n{GOOD}\n', "line 2"),
    "deep line": ("a.jsonl", f"{GOOD}\n{DEEP}\n{GOOD}\n", "line 2"), "deep item": ("a.json", f"[{GOOD},\n{DEEP},\n{GOOD}]", "line 2"),
    "a key twice": ("a.jsonl", f'{GOOD}\n{{"a": 1, "a": 2}}\n{GOOD}\n', "line 2"),
    "a key twice in a list": ("a.json", f'[{GOOD},\n{{"a": 1, "a": 2}},\n{GOOD}]', "line 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_among_good_ones(tmp_path: Path, kind: str) -> None:
    name, text, where = BAD_ROWS[kind]
    write(tmp_path, name, text)
    with pytest.raises(BadRowError) as caught:
        load_rows(name, base_dir=tmp_path, limit=None, on_bad_row="error", limits=SMALL)
    assert caught.value.where == f"{name}, {where}"
    rows = load_rows(name, base_dir=tmp_path, limit=None, on_bad_row="skip", limits=SMALL)
    assert (listed(rows), rows.num_skipped) == ([{"a": "good"}] * 2, 1)


def test_numbers_too_large_for_python_stay_as_they_are_written(tmp_path: Path) -> None:
    digits = "7" * 5000
    for name, text in (("a.jsonl", f'{{"a": {digits}}}\n'), ("a.json", f'[{{"a": {digits}}}]')):
        rows = load_rows(write(tmp_path, name, text), base_dir=tmp_path, limit=None, on_bad_row="error")
        assert str(rows[0]["a"]) == digits


BROKEN = {
    "two files": ("a.csv.zip", zipped(separated(","), "a.csv", "b.csv"), "2 files"), "no zip": ("a.csv.zip", b"a,b\n1,2\n", "zip"),
    "no zst": ("a.csv.zst", b"a,b\n1,2\n", ""), "cut xz": ("a.csv.xz", lzma.compress(separated(","))[:-20], ""),
    "cut bz2": ("a.csv.bz2", bz2.compress(separated(","))[:-20], ""), "no arrow": ("a.arrow", b"hello, this is text", ""),
    "cut arrow": ("a.arrow", arrow(footer=True)[:-40], ""), "cut parquet": ("a.parquet", FORMS["parquet"][1][:-40], ""),
    "empty arrow": ("a.arrow", b"", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_a_page(tmp_path: Path, kind: str) -> None:
    name, data, got = BROKEN[kind]
    with pytest.raises(InputError) as caught:
        load_rows(write(tmp_path, name, data), base_dir=tmp_path, limit=None, on_bad_row="skip")
    assert caught.value.where == name
    assert got in caught.value.got


@pytest.mark.parametrize("text", ["a,b\n1,\n", 'a,b\n1,""\n', "a;b\n1;\n"])
def test_an_empty_value_is_none_as_datasets_has_it(tmp_path: Path, text: str) -> None:
    rows = load_rows(write(tmp_path, "a.csv", text), base_dir=tmp_path, limit=None, on_bad_row="error")
    assert listed(rows) == [{"a": "1", "b": None}]


UNUSUAL = {
    "a time that Python does not know": (pa.array([0, 2**62], pa.timestamp("us")), "cannot be read"),
    "a time zone that nobody knows": (pa.array([0, 1], pa.timestamp("us", tz="Mars/Olympus")), "cannot be read"),
    "bytes that are no UTF-8": (
        pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"x\xe9")]), "cannot be read",
    ),
    "a map": (pa.array([[("k", "v")], [("k", "v"), ("l", "w")]], pa.map_(pa.string(), pa.string())), "a list"),
    "a duration": (pa.array([1, 2], pa.duration("s")), "a timedelta"),
    "binary": (pa.array([b"x", b"y"]), "a bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_of_another_kind_matters_where_it_is_used_alone(tmp_path: Path, kind: str, suffix: str) -> None:
    column, got = UNUSUAL[kind]
    table = pa.table({"a": ["x", "y"], "b": column})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
    rows = load_rows(f"a.{suffix}", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert rows.column("a") == ["x", "y"]
    with pytest.raises(RowProblem) as caught:
        as_text(rows[1], "b")
    assert got in caught.value.got
