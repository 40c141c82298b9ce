"""Rows become text as asked, or as their columns suggest; chats carry loss on what the assistant says."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from atoll.config.schema import Data
from atoll.errors import ConflictError
from atoll.tasks.chat import as_messages, chat_prompt, chat_segments, with_answer
from atoll.tasks.text import TextForm, text_form

TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "a", "tool_calls": None},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "user"},
]

def pieces(form: TextForm, row: dict[str, object], tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, bool]]:
    return [(segment.text, segment.has_loss) for segment in form.segments(row, tokenizer)]


@pytest.mark.parametrize(
    ("data", "row", "wanted"),
    [
        (Data(prompt="{mr} ->", completion=" {ref}"), {"mr": "m", "ref": "r"}, [("m ->", False), (" r", True)]),
        (Data(prompt="{{{a b}}}{a b:.2}", completion="{x.y}{n}"), {"a b": "tex", "x.y": 1.5, "n": 2}, [("{tex}te", False), ("1.52", True)]),
        (Data(prompt="", completion="{x}"), {"x": "r"}, [("", False), ("r", True)]),
        (Data(text="{mr}!"), {"mr": "m", "ref": "r"}, [("m!", True)]),
        (Data(), {"prompt": "p", "completion": "c", "text": "t"}, [("p", False), ("c", True)]),
        (Data(), {"mr": "m", "ref": "r"}, [("m ->", False), (" r", True)]),
        (Data(), {"text": "t", "label": "l"}, [("t", True)]),
    ],
)  # fmt: skip
def test_forms(letters: PreTrainedTokenizerFast, data: Data, row: dict[str, object], wanted: list[tuple[str, bool]]) -> None:
    assert pieces(text_form(data, tuple(row)), row, letters) == wanted


def test_instructions_with_and_without_input(letters: PreTrainedTokenizerFast) -> None:
    form = text_form(Data(), ("instruction", "input", "output"))
    (with_input, _), (answer, _) = pieces(form, {"instruction": "Add", "input": "1 2", "output": "3"}, letters)
    (without, _), _ = pieces(form, {"instruction": "Add", "input": " ", "output": "3"}, letters)
    assert answer == "3"
    assert "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n" in with_input
    assert "### Instruction:\nAdd\n\n### Response:\n" in without
    assert "### Input" not in without


def test_chat_has_loss_on_answers_and_their_end(letters: PreTrainedTokenizerFast) -> None:
    wanted = [
        ("<|system|>s</s><|user|>hi</s><|assistant|>", False),
        ("a</s>", True),
        ("<|user|>why</s><|assistant|>", False),
        ("user</s>", True),
    ]
    form = text_form(Data(), ("messages",))
    assert [piece for piece in pieces(form, {"messages": TALK}, letters) if piece[0]] == wanted
    assert form.reference({"messages": TALK}) == "user"
    assert form.prompt_text({"messages": TALK}, letters) == "".join(text for text, _ in wanted[:3])
    assert [s.text for s in form.segments_with({"messages": TALK}, "other", letters) if s.text][-1] == "other</s>"


def test_a_chat_may_begin_with_the_assistant(letters: PreTrainedTokenizerFast) -> None:
    talk = as_messages([{"role": "assistant", "content": "assistant"}], "m")
    assert [(s.text, s.has_loss) for s in chat_segments(talk, letters)][:2] == [("<|assistant|>", False), ("assistant</s>", True)]
    assert chat_prompt(talk, letters) == "<|assistant|>"
    assert with_answer(talk, "b")[0]["content"] == "b"


def test_messages_may_be_json_text(letters: PreTrainedTokenizerFast) -> None:
    import json

    form = text_form(Data(messages="talk"), ("talk",))
    assert pieces(form, {"talk": json.dumps(TALK)}, letters) == pieces(form, {"talk": TALK}, letters)


@pytest.mark.parametrize("data", [Data(train_on="last"), Data(chat_template_kwargs="{}"), Data(train_on="last", text="{text}")])
def test_what_is_said_of_chats_is_refused_for_other_rows(data: Data) -> None:
    with pytest.raises(ConflictError):
        text_form(data, ("text",))
    if data.text is None:
        form = text_form(data, ("messages",))
        assert form.only_last == (data.train_on == "last")


def test_a_label_takes_the_place_of_the_column() -> None:
    form = text_form(Data(prompt="{q}", completion=" it is {answer}."), ("q", "answer"))
    assert form.as_completion("b") == " it is b."
    assert text_form(Data(prompt="{q}", completion="{q}{answer}"), ("q", "answer")).as_completion("b") == "b"
