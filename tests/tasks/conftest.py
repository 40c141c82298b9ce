"""Shared by the tests of data and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from atoll.base.load import Base
from atoll.tasks.rows import Rows, load_rows

from tests.conftest import random_model
from tests.tasks.letters import letters_tokenizer


@pytest.fixture(scope="session")
def letters() -> PreTrainedTokenizerFast:
    """The tokenizer of single letters, with begin and end tokens."""
    return letters_tokenizer()


@pytest.fixture(scope="session")
def letters_base(letters: PreTrainedTokenizerFast) -> Base:
    """A tiny random Llama over single letters."""
    return Base("random", random_model("llama"), letters, False)


@pytest.fixture
def rows_of(tmp_path: Path) -> Callable[..., Rows]:
    """Write text (or bytes) to a file and load it."""

    def load(content: str | bytes, name: str = "rows.csv", on_bad_row: str = "error", limit: int | None = None) -> Rows:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return load_rows(name, base_dir=tmp_path, limit=limit, on_bad_row=on_bad_row)  # type: ignore[arg-type]

    return load
