"""What carries loss in a chat is what the model says when it is asked, for templates of every sort; any other row is named."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from atoll.errors import TokenizerError
from atoll.tasks.chat import as_messages, chat_closing, chat_prompt, chat_segments, extras_of, last_alone, question_prompt, with_answer
from atoll.tasks.chats.template import NO_EXTRAS, page
from atoll.tasks.rows import RowProblem

from tests.tasks.letters import letters_tokenizer

HEAD = "{% for m in messages %}"
TURNS = "<|{{ m.role }}|>{{ m.content }}"
END = "{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}({{ c.function.name }}{{ c.function.arguments | tojson }}){% endfor %}"
TEMPLATES = {
    "ends every turn": HEAD + TURNS + "<e>\n" + END + ASK,
    "begins with a token": "{{ bos_token }}" + HEAD + TURNS + "<e>" + END + ASK,
    "ends the page with one more": HEAD + TURNS + "<e>\n" + END + ASK.replace("{% endif", "{% else %}</s>{% endif"),
    "ends the last turn otherwise": HEAD + TURNS + "{% if loop.last and m.role == 'assistant' and not add_generation_prompt %}</s>"
    "{% else %}<e>{% endif %}{% endfor %}" + ASK,
    "opens no turn": HEAD + TURNS + "<e>{% endfor %}",
    "needs no opening": HEAD + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}" + END,
    "ends no turn": HEAD + TURNS + "{% endfor %}" + ASK,
    "ends no turn in plain text": HEAD + "{{ m.role }}: {{ m.content }}\n" + END + ASK.replace("<|assistant|>", "assistant:"),
    "ends in plain text": HEAD + "{{ m.role }}: {{ m.content }} END\n" + END + ASK.replace("<|assistant|>", "assistant:"),
    "thinks in the last turn": HEAD + "<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}(){% endif %}{{ m.content }}<e>"
    + END + ASK,
    "opens with a thought": HEAD + TURNS + "<e>" + END + ASK.replace("{% endif", "{{ '()' if think is not defined }}{% endif"),
    "leaves thoughts out": HEAD + "<|{{ m.role }}|>{{ m.content if loop.last else m.content.split('</think>')[-1] }}<e>"
    + END + ASK,
    "writes reasoning": HEAD + "<|{{ m.role }}|>({{ m.reasoning_content }}){{ m.content }}<e>" + END + ASK,
    "writes calls": "{% if tools %}{{ tools | tojson }}{% endif %}" + HEAD + TURNS + CALLS + "<e>" + END + ASK,
    "takes calls as text": HEAD + "<|{{ m.role }}|>{{ m.content + (m.tool_calls[0].function.arguments + m.tool_calls[0].function.name "
    "if m.tool_calls else '') }}<e>" + END + ASK,
    "marks answers": HEAD + "<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<e>{% endgeneration %}"
    "{% else %}{{ m.content }}<e>{% endif %}{% endfor %}" + ASK,
    "marks all but the end": HEAD + "<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<e>{% endfor %}" + ASK,
    "takes parts": HEAD + "<|{{ m.role }}|>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<e>"
    + END + ASK,
    "drops users": HEAD + "{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}<e>{% endif %}{% endfor %}" + ASK,
    "refuses systems": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + HEAD + TURNS
    + "<e>" + END + ASK,
    "sets systems aside": "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}" + TURNS + "<e>" + END + ASK,
}  # fmt: skip
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"c": "x"}}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "one": [USER, ANSWER], "two": [USER, ANSWER, {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}],
    "first": [ANSWER, USER, {"role": "assistant", "content": "so"}], "asks last": [USER, ANSWER, USER],
    "system": [{"role": "system", "content": "sys"}, USER, ANSWER],
    "thought": [
        USER, {"role": "assistant", "content": "<think>hm</think>yo"}, USER, {"role": "assistant", "content": "<think>ah</think>so"},
    ],
    "reasoning": [USER, {**ANSWER, "reasoning_content": "hm"}],
    "call": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "dry"}, ANSWER],
}  # fmt: skip
PLAIN = {"one": ["yo<e>"], "two": ["yo<e>", "so<e>"], "first": ["yo<e>", "so<e>"], "asks last": ["yo<e>"], "system": ["yo<e>"]}
THOUGHT = {"thought": ["<think>hm</think>yo<e>", "<think>ah</think>so<e>"]}
LINES = {name: [said + "\n" for said in several] for name, several in (PLAIN | THOUGHT).items()}
WANTED: dict[str, dict[str, list[str]]] = {
    "ends every turn": LINES, "begins with a token": PLAIN | THOUGHT,
    "ends the page with one more": {
        "one": ["yo<e>\n</s>"], "two": ["yo<e>\n", "so<e>\n</s>"], "first": ["yo<e>\n", "so<e>\n</s>"], "asks last": ["yo<e>\n"],
        "system": ["yo<e>\n</s>"], "thought": ["<think>hm</think>yo<e>\n", "<think>ah</think>so<e>\n</s>"],
    },
    "ends the last turn otherwise": {
        "one": ["yo</s>"], "two": ["yo<e>", "so</s>"], "first": ["yo<e>", "so</s>"], "asks last": ["yo<e>"], "system": ["yo</s>"],
        "thought": ["<think>hm</think>yo<e>", "<think>ah</think>so</s>"],
    },
    "opens no turn": PLAIN | THOUGHT,
    "needs no opening": {
        "one": [" yo</s>"], "two": [" yo</s>", " so</s>"], "first": [" yo</s>", " so</s>"], "asks last": [" yo</s>"],
        "thought": [" <think>hm</think>yo</s>", " <think>ah</think>so</s>"], "system": [" yo</s>"],
    },
    "ends no turn": {
        "one": ["yo<|user|>"], "two": ["yo<|user|>", "so<|user|>"], "first": ["yo<|user|>", "so<|user|>"], "asks last": ["yo<|user|>"],
        "system": ["yo<|user|>"], "thought": ["<think>hm</think>yo<|user|>", "<think>ah</think>so<|user|>"],
    },
    "ends no turn in plain text": {},
    "ends in plain text": {
        name: [f" {said.removesuffix('<e>')} END\n" for said in several] for name, several in (PLAIN | THOUGHT).items()
    } | {"first": ["yo END\n", " so END\n"]},
    "thinks in the last turn": {"one": ["()yo<e>"], "system": ["()yo<e>"]},
    "opens with a thought": {}, "leaves thoughts out": PLAIN,
    "writes reasoning": {name: ["()" + one for one in said] for name, said in (PLAIN | THOUGHT).items()}
    | {"reasoning": ["(hm)yo<e>"], "first": ["yo<e>", "()so<e>"]},
    "writes calls": PLAIN | THOUGHT | {"call": ['(rain{"c": "x"})<e>', "yo<e>"]},
    "takes calls as text": PLAIN | THOUGHT | {"call": ['{"c": "x"}rain<e>', "yo<e>"]},
    "marks answers": PLAIN | THOUGHT, "marks all but the end": {}, "takes parts": PLAIN | THOUGHT, "drops users": {},
    "refuses systems": {name: said for name, said in (PLAIN | THOUGHT).items() if name != "system"}, "sets systems aside": PLAIN | THOUGHT,
}  # fmt: skip


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = letters_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<e>", "<|user|>", "<|assistant|>", "<|system|>"]})
    tokenizer.chat_template = template
    return tokenizer


def spoken(row: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[str]:
    return [segment.text for segment in chat_segments(as_messages(row, "m"), tokenizer, **options) if segment.has_loss]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", TEMPLATES)
def test_loss_falls_on_what_the_model_says(kind: str, row: str) -> None:
    tokenizer, messages = with_template(TEMPLATES[kind]), ROWS[row]
    if row not in WANTED[kind]:
        with pytest.raises(RowProblem):
            chat_segments(as_messages(messages, "m"), tokenizer)
        return
    segments = chat_segments(as_messages(messages, "m"), tokenizer)
    assert [segment.text for segment in segments if segment.has_loss] == WANTED[kind][row]
    # All before the last answer is what the model is given when it is asked, and a changed answer changes nothing else.
    last = max(i for i, segment in enumerate(segments) if segment.has_loss)
    assert "".join(segment.text for segment in segments[:last]) == chat_prompt(as_messages(messages, "m"), tokenizer)
    other = chat_segments(with_answer(as_messages(messages, "m"), "ok"), tokenizer)
    assert [s.text for s in other[:last]] == [s.text for s in segments[:last]]


@pytest.mark.parametrize(
    ("kind", "closing"),
    [
        ("ends every turn", "<e>\n"), ("ends the page with one more", "<e>\n</s>"), ("ends the last turn otherwise", "</s>"),
        ("needs no opening", "</s>"), ("ends no turn", "<|user|>"), ("ends in plain text", " END\n"), ("marks answers", "<e>"),
        ("thinks in the last turn", "<e>"), ("takes parts", "<e>"), ("opens with a thought", "<e>"),
    ],
)  # fmt: skip
def test_what_ends_an_answer(kind: str, closing: str) -> None:
    assert chat_closing(with_template(TEMPLATES[kind])) == closing


@pytest.mark.parametrize("kind", ["thinks in the last turn", "leaves thoughts out"])
def test_the_last_turn_alone_may_carry_loss(kind: str) -> None:
    (said,) = spoken(ROWS["thought"], with_template(TEMPLATES[kind]), learned=last_alone(ROWS["thought"]))
    assert said.endswith("<think>ah</think>so<e>")


@pytest.mark.parametrize("kind", ["ends every turn", "marks answers", "ends no turn"])
def test_each_turn_may_carry_loss_alone(kind: str) -> None:
    tokenizer, messages = with_template(TEMPLATES[kind]), ROWS["two"]
    first, last = WANTED[kind]["two"]
    assert spoken(messages, tokenizer, learned=[True, True, False, False]) == [first]
    assert spoken(messages, tokenizer, learned=[False, False, False, True]) == [last]
    with pytest.raises(RowProblem):
        spoken(messages, tokenizer, learned=[True, False, True, False])


def test_settings_of_a_template_come_from_the_row() -> None:
    tokenizer = with_template(TEMPLATES["opens with a thought"])
    assert spoken(ROWS["two"], tokenizer, extras=extras_of({"chat_template_kwargs": '{"think": 0}'})) == ["yo<e>", "so<e>"]
    with pytest.raises(RowProblem, match="thimk"):
        spoken(ROWS["two"], tokenizer, extras=extras_of({"chat_template_kwargs": {"thimk": 0}}))
    for wrong in ("{", [1], {"tools": []}):
        with pytest.raises(RowProblem):
            extras_of({"chat_template_kwargs": wrong})


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_reach_the_template_or_are_refused(name: str, as_json: bool) -> None:
    given = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    extras = extras_of({name: json.dumps(given) if as_json else given})
    tokenizer = with_template(f"{{% if {name} %}}{{{{ {name} | tojson }}}}{{% endif %}}" + TEMPLATES["ends every turn"])
    segments = chat_segments(as_messages(ROWS["one"], "m"), tokenizer, extras)
    assert "".join(s.text for s in segments) == tokenizer.apply_chat_template(ROWS["one"], tokenize=False, **{name: given})  # type: ignore[arg-type]
    assert chat_prompt(as_messages(ROWS["one"], "m"), tokenizer, extras).startswith(json.dumps(given))
    with pytest.raises(RowProblem, match=name):
        chat_segments(as_messages(ROWS["one"], "m"), with_template(TEMPLATES["ends every turn"]), extras)
    for wrong in ("x", "{", ["x"], {"a": 1}):
        with pytest.raises(RowProblem):
            extras_of({name: wrong})


@pytest.mark.parametrize("arguments", [{"c": "x"}, '{"c": "x"}'])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("kind", ["writes calls", "takes calls as text"])
def test_calls_come_as_objects_or_as_text(kind: str, content: dict[str, object], arguments: object) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": arguments}}], **content}
    assert spoken([USER, call, *ROWS["call"][2:]], with_template(TEMPLATES[kind])) == WANTED[kind]["call"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant"}, {"role": "assistant", "content": None}, {"content": "a"}, "a", {"role": "assistant", "content": 3},
        {"role": "assistant", "content": [{"type": "image"}]}, {"role": "assistant", "content": []},
    ],
)  # fmt: skip
def test_what_is_no_message_is_named(message: object) -> None:
    with pytest.raises(RowProblem, match="message 2"):
        as_messages([USER, message], "m")


def test_content_may_come_in_parts_of_text() -> None:
    row = [USER, {"role": "assistant", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}]}]
    assert spoken(row, with_template(TEMPLATES["ends every turn"])) == ["yo<e>\n"]


BOMBS = (
    "{{ 'a' * 10000000000 }}", "{{ 'a' * 100000000 }}", "{{ messages[0]['content'] * 10000000000 }}", "{{ ([1] * 10000000000) | length }}",
    "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ '%10000000000d' % 1 }}", "{{ '{:10000000000}'.format(1) }}", "{{ 'a' | center(10000000000) }}", "{{ 'a'.ljust(10000000000) }}",
    "{{ messages | tojson(indent=10000000000) }}",
)
"""Few steps, and all memory."""


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% if a > b %}{% set c = a %}{% endif %}{% endfor %}{% endfor %}x",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{{ lipsum(n=999999999) }}", "{{ 9 ** 9 ** 9 }}", "{% if %}", *(BOMBS if sys.platform == "linux" else ()),
        {"tool_use": "x", "rag": "y"}, None,
    ],
)  # fmt: skip
def test_a_template_that_is_endless_broken_or_none_is_refused(template: Any) -> None:
    with pytest.raises(TokenizerError):
        page([USER], with_template(template), NO_EXTRAS)


@pytest.mark.parametrize(
    "template", ["{% for i in range(1000000000000) %}{% endfor %}", "{{ 1 // 0 }}", "{{ messages[7].content.x }}", "{{ 'a' + 1 }}"]
)
def test_a_template_that_fails_names_the_row(template: str) -> None:
    with pytest.raises(RowProblem, match="refuses"):
        page([USER], with_template(template), NO_EXTRAS)


@pytest.mark.parametrize("where", ["user", "assistant"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_half_a_surrogate_pair_in_a_message_is_named(where: str, kind: str) -> None:
    messages = [{**message, "content": "\ud83d"} if message["role"] == where else message for message in (USER, ANSWER)]
    with pytest.raises(RowProblem):
        chat_segments(messages, with_template(TEMPLATES[kind]))


def test_of_templates_by_name_the_default_is_used_and_the_one_for_tools_with_tools() -> None:
    templates: Any = {"default": "A" + TEMPLATES["ends every turn"], "tool_use": "B{{ tools }}" + TEMPLATES["ends every turn"]}
    tokenizer = with_template(templates)
    assert chat_segments(as_messages(ROWS["one"], "m"), tokenizer)[0].text.startswith("A")
    assert chat_segments(as_messages(ROWS["one"], "m"), tokenizer, extras_of({"tools": [{"name": "x"}]}))[0].text.startswith("B")


@pytest.mark.parametrize("kind", [kind for kind in TEMPLATES if "one" in WANTED[kind]])
def test_a_question_gets_the_template_once(kind: str) -> None:
    tokenizer = with_template(TEMPLATES[kind])
    prompt = question_prompt("hi", tokenizer)
    assert prompt == chat_prompt(as_messages(ROWS["one"], "m"), tokenizer)
    assert question_prompt(prompt, tokenizer) == prompt
    assert question_prompt(json.dumps([USER]), tokenizer) == prompt
    assert question_prompt(json.dumps([{**USER, "role": "Human"}]), tokenizer) == prompt
    assert question_prompt(json.dumps([{"from": "human", "value": USER["content"]}]), tokenizer) == prompt


# TRL's training templates, which mark what the assistant says, for each template of a model.
TRL = Path(os.environ.get("TRL_TEMPLATES", "absent"))
TRL_ROWS: dict[str, list[dict[str, Any]]] = {
    "one": [USER, ANSWER], "two": ROWS["two"], "system": ROWS["system"], "reasoning": ROWS["reasoning"],
    "thought": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"}],
    "thoughts": [message | {"content": re.sub("</?think>", "\n\\g<0>\n", str(message["content"]))} for message in ROWS["thought"]],
    "calls": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "name": "rain", "content": "dry"}, ANSWER],
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "rain", "description": "d", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.skipif(not TRL.is_dir(), reason="TRL_TEMPLATES is not the folder chat_templates of the package trl")
@pytest.mark.parametrize("row", TRL_ROWS)
@pytest.mark.parametrize("name", sorted(path.name.removesuffix("_training.jinja") for path in TRL.glob("*_training.jinja")))
def test_masks_are_those_of_trl(name: str, row: str) -> None:
    """Of the model's own template, less what the model is given before it speaks: TRL has loss on some of that, as "<think>"."""
    own, training = ((TRL / f"{name}{part}.jinja").read_text(encoding="utf-8") for part in ("", "_training"))
    extras = extras_of({"tools": [TOOL] if row == "calls" else None})
    for template, is_own in ((own, True), (training, False)):
        tokenizer = with_template(template)
        marks = set(re.findall(r"<[|｜][^|<>{}]*[|｜]>|<\|?[a-z_]+\|?>", own))
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(marks)})
        try:
            segments = chat_segments(as_messages(TRL_ROWS[row], "m"), tokenizer, extras)
        except RowProblem:
            continue
        conversation: Any = TRL_ROWS[row]
        if name in ("idefics3", "llava_next", "smolvlm"):
            conversation = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in conversation]
        (text,), (places,) = render_jinja_template(
            [conversation], tools=extras.tools, chat_template=training, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )  # type: ignore[misc]
        trained, at = [False] * len(text), 0
        for start, stop in places:
            trained[start:stop] = [True] * (stop - start)
        assert "".join(segment.text for segment in segments) == text
        for segment in segments:
            loss = trained[at : at + len(segment.text)]
            given = is_own and not segment.has_loss
            # Gemma's calls end with the token that opens the answer of a tool: its models stop there.
            assert given or all(loss) == segment.has_loss or segment.text.endswith("<|tool_response>") or not loss
            assert not given or not any(loss) or all(loss[loss.index(True) :])
            at += len(segment.text)
