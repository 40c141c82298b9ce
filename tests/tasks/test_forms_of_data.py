"""Each form of rows is taken as docs/data.md says, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.config.schema import Data
from atoll.errors import ConflictError
from atoll.tasks.forms.usual import USUAL, example, told, usual_form
from atoll.tasks.text import text_form

from tests.tasks.forms_of_data import FORMS, outcome, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


@pytest.mark.parametrize("name", FORMS)
def test_a_row_is_taken_as_the_table_says(name: str, tmp_path: Path) -> None:
    form, found = FORMS[name], outcome(FORMS[name], tmp_path)
    if form.refused:
        assert isinstance(found, str)
        assert form.refused in found
    else:
        assert found == form.taken


def test_every_usual_form_is_in_the_table() -> None:
    seen = {form.columns for entry in FORMS.values() if (form := usual_form(tuple(entry.row))) is not None}
    assert {form.columns for form in USUAL} - seen == {("conversation",)}


def test_the_table_is_the_pages() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_what_the_names_of_columns_decide_is_told() -> None:
    dolly = usual_form(("instruction", "context", "response", "category"))
    assert dolly is not None
    assert "Dolly" in told(dolly, dolly.columns, is_chat=False)
    both = usual_form(("messages", "text"))
    assert both is not None
    assert "text is there, too" in told(both, ("messages", "text"), is_chat=False)
    with_system = usual_form(("system", "conversations"))
    assert with_system is not None
    assert "not used: system" in told(with_system, ("system", "conversations"), is_chat=False)
    plain = usual_form(("prompt", "completion"))
    assert plain is not None
    assert told(plain, plain.columns, is_chat=False) == ""


EXAMPLES: dict[str, tuple[dict[str, object], str]] = {
    "texts": ({"id": "1", "Instruction": "q", "Output": "a"}, 'prompt = "{Instruction}\\n" and completion = "{Output}"'),
    "one text": ({"doc_id": 7, "body": "q", "score": 0.5}, 'text = "{body}"'),
    "chats": ({"prompt": "q", "chosen": [{"role": "user", "content": "q"}], "rejected": []}, 'messages = "chosen"'),
    "nothing else": ({"id": 1}, 'text = "{id}"'),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_what_could_be_written_is_not_the_first_column_that_comes(kind: str) -> None:
    row, wanted = EXAMPLES[kind]
    assert example(tuple(row), row) == wanted
    with pytest.raises(ConflictError) as caught:
        text_form(Data(), tuple(row), row)
    assert wanted in caught.value.do


def test_columns_that_a_chat_template_gets_are_not_called_unused() -> None:
    chats = usual_form(("messages", "tools", "documents"))
    assert chats is not None
    assert told(chats, ("messages", "tools", "documents"), is_chat=True) == ""
