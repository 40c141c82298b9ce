"""Every kind of bad data is one error that names the file, the line and what to do; nothing is guessed."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas
import pytest
from transformers import PreTrainedTokenizerFast

from atoll.config.schema import Data
from atoll.errors import (
    BadRowError,
    BadValueError,
    ColumnError,
    ConflictError,
    DataFileError,
    EmptyDataError,
    InputError,
    TokenizerError,
)
from atoll.tasks.rows import Rows, load_rows
from atoll.tasks.text import text_form
from atoll.tasks.tokens import tokenize

from tests.tasks.letters import letters_tokenizer

RowsOf = Callable[..., Rows]


@dataclass(frozen=True)
class Bad:
    """A file, what it raises, where, and words that `got` and `do` must hold."""

    name: str
    content: str | bytes
    error: type[InputError]
    where: str
    got: str
    do: str


MEND = "mend the row"
FILES = {
    "bytes that are no UTF-8": Bad("a.csv", b"text\nfine\ncaf\xe9\n", DataFileError, "a.csv, line 3", "0xe9", "iconv"),
    "bytes that are no UTF-8, in a header": Bad("a.csv", b"text,caf\xe9\n1,2\n", DataFileError, "a.csv, line 1", "0xe9", "iconv"),
    "bytes that are no UTF-8, in a list": Bad("a.json", b'[{"a": "1"},\n{"a": "\xe9"}]', DataFileError, "a.json, line 2", "0xe9", "iconv"),
    "Excel in name CSV": Bad("a.csv", b"PK\x03\x04\xff\xe9", DataFileError, "a.csv", "Excel", "what it is"),
    "UTF-16": Bad("a.csv", "text\nfine\n".encode("utf-16"), DataFileError, "a.csv, line 1", "UTF-16", "iconv"),
    "empty file": Bad("a.csv", "", EmptyDataError, "a.csv", "no text", "rows"),
    "only a byte order mark": Bad("a.jsonl", b"\xef\xbb\xbf\n", EmptyDataError, "a.jsonl", "no text", "rows"),
    "header only": Bad("a.csv", "text,label\n", EmptyDataError, "a.csv", "header", "rows"),
    "empty list": Bad("a.json", "[]", EmptyDataError, "a.json", "empty list", "rows"),
    "too few values": Bad("a.csv", "a,b\n1,2\n3\n", BadRowError, "a.csv, line 3", "1 value", MEND),
    "too many values": Bad("a.csv", "a,b\n1,2\n\n3,4,5\n", BadRowError, "a.csv, line 4", "3 values", MEND),
    "too many values after a long row": Bad("a.csv", 'a,b\n"1\n1",2\n3,4,5\n', BadRowError, "a.csv, line 4", "3 values", MEND),
    "open quote": Bad("a.csv", 'a,b\n1,"2\n3,4\n', BadRowError, "a.csv, line 2", "quoting", MEND),
    "two columns of one name": Bad("a.csv", "a,b,a\n1,2,3\n", DataFileError, "a.csv, line 1, column 1", "'a' twice", "rename"),
    "broken JSON line": Bad("a.jsonl", '{"a": "1"}\n{"a": }\n', BadRowError, "a.jsonl, line 2", "column 7", MEND),
    "cut-off JSON line": Bad("a.jsonl", '{"a": "1"}\n{"a": "2', BadRowError, "a.jsonl, line 2", "broken JSON", MEND),
    "JSON line that is a list": Bad("a.jsonl", '{"a": "1"}\n["1"]\n', BadRowError, "a.jsonl, line 2", "list", MEND),
    "JSON line that is a number": Bad("a.jsonl", "3\n", BadRowError, "a.jsonl, line 1", "number", MEND),
    "JSON nested too deeply": Bad("a.jsonl", "[" * 100000 + "\n", BadRowError, "a.jsonl, line 1", "JSON", MEND),
    "JSON object at the top": Bad("a.json", '{"a": [{}], "b": []}', DataFileError, "a.json, line 1", "object at the top", "one list"),
    "JSON text at the top": Bad("a.json", 'hello', DataFileError, "a.json, line 1", "'hello'", "one list"),
    "broken item in a list": Bad("a.json", '[\n{"a": "1"},\n{"a" "2"}\n]', BadRowError, "a.json, line 3", "column 6", MEND),
    "item that is no object": Bad("a.json", '[\n{"a": "1"},\n7\n]', BadRowError, "a.json, line 3", "number", MEND),
    "list without commas": Bad("a.json", '[{"a": "1"}\n {"a": "2"}]', BadRowError, "a.json, line 2", "comma", MEND),
    "list that is not closed": Bad("a.json", '[{"a": "1"},\n', BadRowError, "a.json, line 2", "closed", MEND),
    "text after the list": Bad("a.json", '[{"a": "1"}]\nend', BadRowError, "a.json", "after the list", MEND),
    "unknown suffix": Bad("a.xlsx", "a", DataFileError, "a.xlsx", ".xlsx", "convert"),
    "nearly known suffix": Bad("a.josnl", "{}", DataFileError, "a.josnl", ".josnl", "did you mean '.jsonl'?"),
    "plain text": Bad("a.txt", "a", DataFileError, "a.txt", ".txt", ".jsonl"),
    "no suffix": Bad("data", "{}", DataFileError, "data", "no suffix", "convert"),
    "Parquet in name only": Bad("a.parquet", "a,b\n", DataFileError, "a.parquet", "", "name the file by what it is"),
    "gzip in name only": Bad("a.csv.gz", "a,b\n1,2\n", DataFileError, "a.csv.gz", "gzip", "write it again"),
    "gzip cut off": Bad("a.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:-9], DataFileError, "a.csv.gz", "", "write it again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_named_with_its_line(rows_of: RowsOf, kind: str) -> None:
    bad = FILES[kind]
    with pytest.raises(bad.error) as caught:
        rows_of(bad.content, bad.name)
    error = caught.value
    assert type(error) is bad.error
    assert error.where.startswith(bad.where)
    assert bad.got in error.got
    assert bad.do in error.do
    assert error.expected
    assert error.exit_status == 2


SPOILT = {
    "a.csv": b"a,b\n1,2\ncaf\xe9,4\n5,\"caf\xe9\n\"\n7,8\n", "old.csv": b"a,b\r1,2\rcaf\xe9,4\r5,\xe9\r7,8",
    "a.tsv": b"a\tb\n1\t2\ncaf\xe9\t4\n5\t\xe9\n7\t8\n",
    "a.jsonl": b'{"a": 1, "b": 2}\n{"a": "\xe9", "b": 4}\n{"\xe9": 5, "b": 6}\n{"a": 7, "b": 8}\n',
    "a.json": b'[{"a": 1, "b": 2}, {"a": "\xe9", "b": 4},\n{"\xe9": 5, "b": 6}, {"a": 7, "b": 8}]',
    "lines.json": b'{"a": 1, "b": 2}\n{"a": "\xe9", "b": 4}\n{"\xe9": 5, "b": 6}\n{"a": 7, "b": 8}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_byte_that_is_no_utf_8_spoils_its_row_alone(rows_of: RowsOf, name: str) -> None:
    rows = rows_of(SPOILT[name], name, on_bad_row="skip")
    assert [[str(value) for value in rows[n].values()] for n in range(len(rows))] == [["1", "2"], ["7", "8"]]
    assert rows.num_skipped == 2


def test_columns_without_a_name_are_called_as_pandas_calls_them(rows_of: RowsOf) -> None:
    text = ",v1,v2,,\n0,ham,hi,,\n1,spam,x,y,\n"
    rows = rows_of(text, "a.csv")
    assert list(rows.columns) == list(pandas.read_csv(io.StringIO(text)).columns)
    assert rows[1]["Unnamed: 3"] == "y"


def test_rows_that_an_open_quote_takes_along_are_told(rows_of: RowsOf) -> None:
    rows = rows_of('a,b\n1,2\n"3,4\n5,6\n7,8\n', "a.csv", on_bad_row="skip")
    assert (len(rows), rows.num_skipped) == (1, 1)
    assert "lines 3 to 5" in rows.notes[0]


def test_an_object_with_one_list_of_objects_is_that_list(rows_of: RowsOf) -> None:
    rows = rows_of('{"version": {"data": [1]},\n"data": [{"a": "1"},\n{"a": "2"}]}\n', "a.json")
    assert (list(rows.column("a")), rows.where(1)) == (["1", "2"], "a.json, line 3")
    assert "the list 'data' is read" in rows.notes[0]


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("a\n1\n")
    with pytest.raises(DataFileError) as caught:
        load_rows("note.csv", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert caught.value.do == "did you mean 'notes.csv'?"
    assert caught.value.got == f"nothing of this name in {tmp_path.resolve()}"
    (tmp_path / "notes.csv").rename(tmp_path / "events.jsonl")
    with pytest.raises(DataFileError) as caught:
        load_rows("vents.jsonl", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert "events.jsonl" not in caught.value.do, "which Atoll itself writes"
    with pytest.raises(DataFileError) as caught:
        load_rows("there/note.csv", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert "no folder there" in caught.value.do


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(DataFileError) as caught:
        load_rows(".", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert "README.md" in caught.value.got


def test_a_folder_of_unequal_columns(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.csv").write_text("mr,ref\n1,2\n")
    (tmp_path / "d" / "b.csv").write_text("MR\n1\n")
    with pytest.raises(DataFileError) as caught:
        load_rows("d", base_dir=tmp_path, limit=None, on_bad_row="error")
    assert caught.value.where == "d/b.csv"
    assert "d/a.csv: mr, ref" in caught.value.expected


def test_all_rows_skipped_is_an_error(rows_of: RowsOf) -> None:
    with pytest.raises(EmptyDataError) as caught:
        rows_of("a,b\n1\n2\n", on_bad_row="skip")
    assert "2 skipped" in caught.value.got


VALUES = {
    "missing key": ('{"a": "x", "b": "y"}\n{"a": "x"}\n', "line 2, column b", "no value"),
    "null": ('{"a": "x", "b": "y"}\n\n{"a": null, "b": "y"}\n', "line 3, column a", "no value"),
    "nested list": ('{"a": ["x"], "b": "y"}\n', "line 1, column a", "a list"),
    "nested object": ('{"a": "x", "b": {"c": "y"}}\n', "line 1, column b", "a dict"),
    "not a number": ('{"a": NaN, "b": "y"}\n', "line 1, column a", "no value"),
    "half a surrogate pair": ('{"a": "\\ud83d", "b": "y"}\n', "line 1, column a", "surrogate"),
    "completion cut off": ('{"a": "x", "b": "y"}\n{"a": "0123456789", "b": "y"}\n', "line 2", "begins at token"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_bad_value_is_named_or_skipped(rows_of: RowsOf, letters: PreTrainedTokenizerFast, kind: str) -> None:
    content, where, got = VALUES[kind]
    data = Data(prompt="{a}>", completion="{b}")
    rows = rows_of(content, "a.jsonl")
    with pytest.raises(BadRowError) as caught:
        tokenize(rows, text_form(data, rows.columns), letters, 8)
    assert caught.value.where == f"a.jsonl, {where}"
    assert got in caught.value.got
    assert 'on_bad_row = "skip"' in caught.value.do
    more = rows_of(content + '{"a": "x", "b": "y"}\n', "a.jsonl", on_bad_row="skip")
    examples = tokenize(more, text_form(data, more.columns), letters, 8)
    assert (examples.num_skipped, len(examples)) == (1, len(more) - 1)


def test_a_row_of_one_token(rows_of: RowsOf) -> None:
    rows = rows_of("text\nlong\nx\n")
    with pytest.raises(BadRowError) as caught:
        tokenize(rows, text_form(Data(text="{text}"), rows.columns), letters_tokenizer(begin=False, eos=None), 8)
    assert caught.value.where == "rows.csv, line 3"


def test_rows_without_any_usable_one(rows_of: RowsOf, letters: PreTrainedTokenizerFast) -> None:
    rows = rows_of('{"text": null}\n{"text": null}\n', "a.jsonl", on_bad_row="skip")
    with pytest.raises(EmptyDataError) as caught:
        tokenize(rows, text_form(Data(), rows.columns), letters, 8)
    assert caught.value.where == "a.jsonl"


MESSAGES = {
    "no JSON": ("hello", "broken JSON"),
    "no list": ('{"role": "user"}', "a dict"),
    "empty": ("[]", "no messages"),
    "no content": ('[{"role": "assistant"}]', "message 1"),
    "content in parts": ('[{"role": "user", "content": [{"type": "text"}]}]', "message 1"),
    "no answer": ('[{"role": "user", "content": "hi"}]', "assistant"),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_bad_messages(rows_of: RowsOf, letters: PreTrainedTokenizerFast, kind: str) -> None:
    import json

    value, got = MESSAGES[kind]
    rows = rows_of(json.dumps({"messages": value}) + "\n", "a.jsonl")
    with pytest.raises(BadRowError) as caught:
        tokenize(rows, text_form(Data(), rows.columns), letters, 64)
    assert caught.value.where == "a.jsonl, line 1, column messages"
    assert got in caught.value.got


def test_a_template_may_refuse_messages(rows_of: RowsOf) -> None:
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}x"
    rows = rows_of('{"messages": [{"role": "assistant", "content": "hi"}]}\n', "a.jsonl")
    with pytest.raises(BadRowError):
        tokenize(rows, text_form(Data(), rows.columns), tokenizer, 64)


def test_a_tokenizer_without_a_chat_template(rows_of: RowsOf) -> None:
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = None
    rows = rows_of('{"messages": [{"role": "assistant", "content": "hi"}]}\n', "a.jsonl")
    with pytest.raises(TokenizerError) as caught:
        tokenize(rows, text_form(Data(), rows.columns), tokenizer, 64)
    assert "chat" in caught.value.do


FORMS = {
    "prompt alone": (Data(prompt="{mr}"), ConflictError, "[data]", "completion"),
    "completion alone": (Data(completion="{mr}"), ConflictError, "[data]", "prompt"),
    "text and messages": (Data(text="{mr}", messages="mr"), ConflictError, "[data]", "keep one"),
    "prompt, completion and text": (Data(prompt="{mr}", completion="{ref}", text="{mr}"), ConflictError, "[data]", "keep one"),
    "unknown column in prompt": (Data(prompt="{rm} ->", completion="{ref}"), ColumnError, "[data] prompt", "did you mean 'mr'?"),
    "unknown column in text": (Data(text="{reff}"), ColumnError, "[data] text", "did you mean 'ref'?"),
    "column in other case": (Data(messages="REF"), ColumnError, "[data] messages", "did you mean 'ref'?"),
    "far column": (Data(text="{instruction}"), ColumnError, "[data] text", "use one of mr, ref"),
    "open brace": (Data(text="{mr"), BadValueError, "[data] text", "{{"),
    "lone closing brace": (Data(text="mr}"), BadValueError, "[data] text", "{{"),
    "number instead of a name": (Data(text="{}"), BadValueError, "[data] text", "{{"),
    "conversion": (Data(text="{mr!r}"), BadValueError, "[data] text", "{{"),
    "number format": (Data(text="{mr:>10}"), BadValueError, "[data] text", "{{"),
    "attribute": (Data(text="{mr.upper}"), ColumnError, "[data] text", "use one of"),
    "completion without a column": (Data(prompt="{mr}", completion=" yes"), BadValueError, "[data] completion", "column"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_a_bad_form(kind: str) -> None:
    data, error, where, do = FORMS[kind]
    with pytest.raises(error) as caught:
        text_form(data, ("mr", "ref"))
    assert type(caught.value) is error
    assert caught.value.where == where
    assert do in caught.value.do
    assert caught.value.got


def test_no_form_and_no_usual_columns() -> None:
    with pytest.raises(ConflictError) as caught:
        text_form(Data(), ("question", "label"))
    assert "question, label" in caught.value.got
    assert "{question}" in caught.value.do
