"""JSON and TOML that anybody may have written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.adapters.peft_files import CONFIG_FILE, load_adapter
from atoll.base.headers import read_headers
from atoll.config.load import load
from atoll.errors import AtollError
from atoll.parsed import DEPTH, parse_json, parse_toml
from atoll.runs.events import read_events
from atoll.runs.layout import read_object

MANY = 100_000
BAD_JSON = {
    "lists": "[" * MANY + "]" * MANY, "not ended": "[" * MANY, "objects": '{"a":' * MANY + "1" + "}" * MANY, "digits": "9" * 5000,
    "one too deep": "[" * (DEPTH + 1) + "]" * (DEPTH + 1), "no UTF-8": b'"\xff"',
}  # fmt: skip
BAD_TOML = {
    "lists": "x = " + BAD_JSON["lists"], "tables": "x = " + "{a = " * MANY + "1" + "}" * MANY,  # type: ignore[operator]
    "names": "[" + ".".join("a" * MANY) + "]", "digits": "x = " + "9" * 5000,
}  # fmt: skip
READERS: list[Callable[[Path], object]] = [
    load_adapter, lambda folder: read_headers(str(folder)), lambda folder: list(read_events(folder / "events.jsonl")),
    lambda folder: read_object(folder / "summary.json"),
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_what_is_wrong_with_json_is_a_value_error(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    for name in (CONFIG_FILE, "config.json", "events.jsonl", "summary.json"):
        (tmp_path / name).write_bytes((text if isinstance(text, bytes) else text.encode()) + b"\n")
    for read in READERS:
        with pytest.raises(AtollError):
            read(tmp_path)


@pytest.mark.parametrize("text", BAD_TOML.values(), ids=BAD_TOML)
def test_what_is_wrong_with_toml_is_a_page(text: str, tmp_path: Path) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        parse_toml(text)
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(AtollError, match="not valid TOML") as caught:
        load(tmp_path / "run.toml")
    assert len(caught.value.page()) < 2000


def test_what_is_right_is_what_it_says() -> None:
    deep = "[" * DEPTH + "]" * DEPTH
    assert parse_json(deep) == json.loads(deep)
    assert parse_toml(f"x = {deep[1:-1]}") == tomllib.loads(f"x = {deep[1:-1]}")
