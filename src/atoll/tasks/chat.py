"""Chat messages as text with loss on what the assistant says, through the tokenizer's own chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atoll.errors import TokenizerError
from atoll.tasks.rows import RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a row's text, and whether its tokens carry loss."""

    text: str
    has_loss: bool


def as_messages(value: object, column: str) -> tuple[Message, ...]:
    """A column's value, a list of {role, content} or the JSON text of one, as messages.

    Raises: RowProblem.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as problem:
            raise RowProblem(f"broken JSON at character {problem.pos}: {problem.msg}", "a list of messages", column) from None
    if not isinstance(value, list) or not value:
        raise RowProblem(f"a {type(value).__name__}" if value else "no messages", "a list of {role, content}", column)
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RowProblem(f"message {number} is {str(message)[:60]!r}", 'an object with texts "role" and "content"', column)
    if not any(message["role"] == "assistant" for message in value):
        raise RowProblem("no message of the assistant", 'at least one message with role "assistant"', column)
    # Arrow fills objects of unequal keys up with nulls, which templates would take for values.
    return tuple({key: item for key, item in message.items() if item is not None} for message in value)


def with_answer(messages: Sequence[Message], answer: str) -> tuple[Message, ...]:
    """The messages up to the assistant's last, which says `answer` instead."""
    last = _last_answer(messages)
    return (*messages[:last], {**messages[last], "content": answer})


def chat_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything before the assistant's last answer, with the opening of its turn."""
    last = _last_answer(messages)
    # Templates refuse an empty conversation: what opens the first turn shows only in front of an answer.
    return _render(messages[:last], tokenizer, open_turn=True) if last else _by_marks(messages[:1], tokenizer)[0].text


def chat_segments(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[Segment, ...]:
    """The conversation in pieces, with loss on the assistant's turns up to and including their closing mark.

    Raises: RowProblem where the template refuses the messages; TokenizerError where there is no template, or one that cannot be followed.
    """
    return _by_growing(messages, tokenizer) or _by_marks(messages, tokenizer)


def _by_growing(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[Segment, ...]:
    """Render ever longer conversations; each must continue the one before. Empty where the template writes earlier turns anew."""
    done, segments = "", []
    if messages[0]["role"] == "assistant":
        return ()
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _render(messages[:i], tokenizer, open_turn=True), _render(messages[: i + 1], tokenizer)
        if not before.startswith(done) or not after.startswith(before):
            return ()
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    whole = _render(messages, tokenizer)
    return (*segments, Segment(whole[len(done) :], False)) if whole.startswith(done) else ()


def _by_marks(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[Segment, ...]:
    """Put a mark around each answer and see where the template writes it."""
    marks = [(f"\ue000{i}\ue001", f"\ue002{i}\ue003") for i in range(len(messages))]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    marked = list(messages)
    for i in answers:
        marked[i] = {**messages[i], "content": f"{marks[i][0]}{messages[i]['content']}{marks[i][1]}"}
    rest, segments = _render(marked, tokenizer), []
    for i in answers:
        before, opened, rest = rest.partition(marks[i][0])
        answer, closed, rest = rest.partition(marks[i][1])
        alone = _render(marked[: i + 1], tokenizer).rpartition(marks[i][1])[2]
        if not opened or not closed:
            raise _cannot_follow(tokenizer)
        ending = alone if rest.startswith(alone) else ""
        segments += [Segment(before, False), Segment(answer + ending, True)]
        rest = rest[len(ending) :]
    segments.append(Segment(rest, False))
    if "".join(segment.text for segment in segments) != _render(messages, tokenizer):
        raise _cannot_follow(tokenizer)
    return tuple(segments)


def last_answer(messages: Sequence[Message]) -> str:
    """What the assistant says last."""
    return str(messages[_last_answer(messages)]["content"])


def _last_answer(messages: Sequence[Message]) -> int:
    return max(i for i, message in enumerate(messages) if message["role"] == "assistant")


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, open_turn: bool = False) -> str:
    import jinja2

    if not tokenizer.chat_template:
        raise TokenizerError(
            "the tokenizer has no chat template", where="[data] messages", got=f"the tokenizer of {tokenizer.name_or_path or 'the base'}",
            expected="a tokenizer_config.json or chat_template.jinja with a chat template",
            do="use a chat model as the base, or give prompt and completion columns instead of messages",
        )  # fmt: skip
    try:
        conversation: Any = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=open_turn))
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError) as problem:
        raise RowProblem(f"messages that the chat template refuses: {problem}", "roles in the order that the model knows", "") from None


def _cannot_follow(tokenizer: PreTrainedTokenizerBase) -> TokenizerError:
    return TokenizerError(
        "the chat template rewrites what the assistant said, so its turns cannot be told from the rest", where="[data] messages",
        got=f"the template of {tokenizer.name_or_path or 'the base'}",
        expected="a template that writes the assistant's messages as they are",
        do="give one exchange per row, or use prompt and completion",
    )  # fmt: skip
