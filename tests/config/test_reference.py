"""Documents that the schema writes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from atoll.config.checks.availability import AVAILABLE, DEFAULT_ONLY
from atoll.config.keys import keys, section_names
from atoll.config.load import load_config
from atoll.config.reference import commented_toml, markdown
from atoll.config.schema import RunConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_configuration_page_is_current() -> None:
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert written == markdown(), "run: python -m atoll.config.reference > docs/configuration.md"


def test_every_key_is_one_row_of_a_table() -> None:
    rows = [line for line in markdown().partition("## Parts")[0].splitlines() if line.startswith("| `") and line.endswith(" |")]
    assert len(rows) == len(keys())


def test_every_key_has_a_description_and_words_for_what_it_takes() -> None:
    for key in keys().values():
        assert key.description, key.path
        assert key.expected, key.path


def test_reserved_keys_exist() -> None:
    assert set(AVAILABLE) <= set(keys())
    assert all(path in section_names() or path in keys() for path in DEFAULT_ONLY)


def test_reserved_keys_hold_at_their_defaults(tmp_path: Path) -> None:
    text = commented_toml({})
    with_defaults = re.sub(r"^#(\w+ = (?!\.\.\.))", r"\1", text, flags=re.MULTILINE)
    without_edges = with_defaults[: with_defaults.index("# [[edge]]")]
    assert len(tomllib.loads(without_edges)) == len(section_names()) - 2
    (tmp_path / "run.toml").write_text(without_edges)
    assert load_config(tmp_path / "run.toml") == RunConfig()


def test_the_commented_file_names_every_key_and_sets_only_what_it_is_told(tmp_path: Path) -> None:
    text = commented_toml({"run.rounds": 7, "data.train": "a.csv"})
    for key in keys().values():
        if key.section in section_names():
            assert re.search(rf"^#?{key.name} = ", text, flags=re.MULTILINE), key.path
    assert {name: table for name, table in tomllib.loads(text).items() if table} == {"run": {"rounds": 7}, "data": {"train": "a.csv"}}
    assert max(map(len, text.splitlines())) <= 140
