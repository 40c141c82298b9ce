"""Chat messages as text with loss on what the assistant says, through the tokenizer's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from atoll.parsed import parse_json
from atoll.tasks.chats.template import NO_EXTRAS, Extras, page, template_of
from atoll.tasks.chats.template import Message as Message
from atoll.tasks.chats.turns import REASONING, opening, said, spoken_page
from atoll.tasks.forms.conversations import conversation
from atoll.tasks.rows import RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_SETTINGS: Mapping[str, object] = {}
_OWN_NAMES = {"messages", "tools", "documents", "add_generation_prompt"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a row's text, and whether its tokens carry loss."""

    text: str
    has_loss: bool


def as_messages(value: object, column: str) -> tuple[Message, ...]:
    """A column's value, a list of {role, content} or the JSON text of one, as messages; content may be missing beside tool calls.

    Raises: RowProblem.
    """
    value = _parsed(value, "a list of messages", column)
    if not isinstance(value, list) or not value:
        raise RowProblem(f"a {type(value).__name__}" if value else "no messages", "a list of {role, content}", column)
    messages = tuple(_message(message, number, column) for number, message in enumerate(value, start=1))
    if not any(message["role"] == "assistant" for message in messages):
        raise RowProblem("no message of the assistant", 'at least one message with role "assistant"', column)
    return messages


def extras_of(row: Mapping[str, object], settings: Mapping[str, object] = NO_SETTINGS) -> Extras:
    """What a row's columns tools, documents and chat_template_kwargs, or the JSON texts of them, give a template, beside `settings`.

    Raises: RowProblem.
    """
    given: dict[str, list[object] | None] = {}
    for name in ("tools", "documents"):
        value = _without_nulls(_parsed(row.get(name), "a list of objects", name))
        if value and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise RowProblem(repr(value)[:60], "a list of objects, or the JSON text of one", name)
        given[name] = list(value) if isinstance(value, list) and value else None
    old = _without_nulls(_parsed(row.get("functions"), "a list of objects", "functions"))
    if old and (given["tools"] or not isinstance(old, list)):
        raise RowProblem("functions beside tools, or no list", "a list of objects, in one of the two", "functions")
    if isinstance(old, list) and old:  # As OpenAI wrote tools before 2024.
        return extras_of({**row, "functions": None, "tools": [{"type": "function", "function": one} for one in old]}, settings)
    name = "chat_template_kwargs"
    own = _without_nulls(_parsed(row.get(name), "an object", name)) or {}
    if not isinstance(own, dict) or _OWN_NAMES & set(own):
        raise RowProblem(repr(own)[:60], 'an object of the template\'s own variables, as {"enable_thinking": false}', name)
    return Extras(given["tools"], given["documents"], {**settings, **own})


def with_answer(messages: Sequence[Message], answer: str) -> tuple[Message, ...]:
    """The messages up to the assistant's last, which says `answer` instead."""
    last = _last_answer(messages)
    return (*messages[:last], {**messages[last], "content": answer})


def chat_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, extras: Extras = NO_EXTRAS) -> str:
    """Everything before the assistant's last answer, with the opening of its turn.

    Raises: as chat_segments.
    """
    return opening(_accepted(messages, tokenizer, extras)[: _last_answer(messages)], tokenizer, extras)


def chat_segments(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, extras: Extras = NO_EXTRAS, *, learned: Sequence[bool] | None = None
) -> tuple[Segment, ...]:  # fmt: skip
    """The conversation in pieces, with loss on the assistant's turns up to and including what ends them; with `learned`, on those of the
    messages that it names alone.

    Raises: RowProblem where the template refuses the messages, leaves something out, or writes turns otherwise than they were said;
    TokenizerError where there is no template, or a broken or endless one.
    """
    template = template_of(tokenizer, extras)
    for name in extras.settings:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise RowProblem(f"{name}, which the chat template does not know", "variables of the template", "chat_template_kwargs")
    found = spoken_page(_accepted(messages, tokenizer, extras), tokenizer, extras, learned)
    segments, at = list[Segment](), 0
    for start, stop in found.places:
        segments += [Segment(found.text[at:start], False), Segment(found.text[start:stop], True)]
        at = stop
    return (*segments, Segment(found.text[at:], False))


def question_prompt(text: str, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, object] = NO_SETTINGS) -> str:
    """What a model of chats is given for what a user says; or for JSON, a list of messages or a row with messages, tools and the like.

    A prompt that is already written as the template does it stays as it is, behind the template's begin token.

    Raises: as chat_segments.
    """
    messages: Sequence[Message] = ({"role": "user", "content": "?"},)
    extras = Extras(settings=settings)
    written = opening(_accepted(messages, tokenizer, extras), tokenizer, extras)
    if written.rpartition("?")[2].strip() and text.endswith(written.rpartition("?")[2]):
        begin = str(tokenizer.bos_token or "")
        return begin + text if written.startswith(begin) and not text.startswith(begin) else text
    messages = ({"role": "user", "content": text},)
    with suppress(ValueError):
        given = parse_json(text)
        row = given if isinstance(given, dict) else {"messages": given}
        listed = row.get("messages")
        if isinstance(listed, list) and listed and all(isinstance(message, dict) for message in listed):
            said_so_far = conversation({"messages": listed}, ("messages",)).messages
            messages = [_message(message, number, "messages") for number, message in enumerate(said_so_far, start=1)]
            extras = extras_of(row, settings)
    return opening(_accepted(messages, tokenizer, extras), tokenizer, extras)


def chat_closing(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, object] = NO_SETTINGS) -> str:
    """What the template writes behind an answer, such as "<|im_end|>"; nothing where it cannot be told.

    Raises: TokenizerError.
    """
    probe, extras = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}), Extras(settings=settings)
    with suppress(RowProblem):
        return [segment.text for segment in chat_segments(probe, tokenizer, extras) if segment.has_loss][-1].rpartition("!")[2]
    with suppress(RowProblem):  # A template that wants reasoning, for one, writes the end of a turn all the same.
        return page(_accepted(probe, tokenizer, extras), tokenizer, extras).rpartition("!")[2]
    return ""


def last_alone(messages: Sequence[Message]) -> list[bool]:
    """Which of the messages is the assistant's last."""
    return [i == _last_answer(messages) for i in range(len(messages))]


def last_answer(messages: Sequence[Message]) -> str:
    """What the assistant says last."""
    return said(messages[_last_answer(messages)])


def _message(message: object, number: int, column: str) -> Message:
    """A message without nulls, which templates would take for values: Arrow fills objects of unequal keys up with them."""
    problem = RowProblem(f"message {number} is {str(message)[:60]!r}", 'an object with texts "role" and "content"', column)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise problem
    plain = _without_nulls(message)
    assert isinstance(plain, dict)
    content = plain.get("content")
    if isinstance(content, list):
        if not content or not all(isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text" for part in content):
            raise RowProblem(f"message {number}, whose content has other parts than text", "texts", column)
        plain = {**plain, "content": "".join(part["text"] for part in content)}
    elif not isinstance(content, str) and (content is not None or not any(plain.get(key) for key in ("tool_calls", *REASONING))):
        raise problem
    return plain


def _without_nulls(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _parsed(value: object, expected: str, column: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as problem:
        raise RowProblem(f"broken JSON: {problem}"[:120], expected, column) from None


def _accepted(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, extras: Extras) -> Sequence[Message]:
    """The messages in the first form that the template takes: arguments of calls as objects or as JSON text, no content as "" or absent,
    texts as such or (templates of models that see) as a list of parts.
    """
    has_calls = any(message.get("tool_calls") or "content" not in message for message in messages)
    takes_parts = re.search(r"""\.type\b|['"]type['"]""", template_of(tokenizer, extras)) is not None
    if not has_calls and not takes_parts:
        return messages
    choices = product((False, True) if takes_parts else (False,), *[(False, True) if has_calls else (False,)] * 2)
    forms = [[_in_form(message, parts, as_text, filled) for message in messages] for parts, as_text, filled in choices]
    for form in forms:
        with suppress(RowProblem):
            text = page(form, tokenizer, extras)
            if all(said(message).strip() in text for message in messages if message["role"] == "user"):
                return form
    return forms[0]


def _in_form(message: Message, parts: bool, as_text: bool, filled: bool) -> Message:
    changed = dict(message)
    if filled:
        changed.setdefault("content", "")
    if parts and "content" in changed:
        changed["content"] = [{"type": "text", "text": changed["content"]}]
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        changed["tool_calls"] = [_call_in_form(call, as_text=as_text) for call in calls]
    return changed


def _call_in_form(call: object, *, as_text: bool) -> object:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_in_form(call["function"], as_text=as_text)}
    given = call.get("arguments")
    if as_text and isinstance(given, dict):
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    if not as_text and isinstance(given, str):
        try:
            parsed = parse_json(given)
        except ValueError:
            return call
        return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
    return call


def _last_answer(messages: Sequence[Message]) -> int:
    return max(i for i, message in enumerate(messages) if message["role"] == "assistant")
