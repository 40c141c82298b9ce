"""How a row becomes text: templates over the columns, plain text, or chat messages.

A template names columns in braces, "{mr} ->"; "{{" and "}}" are braces. "{text:.800}" takes the first 800 characters of a column, so that
a long document does not push the completion behind it out of max_length.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from atoll.config.schema import Data
from atoll.errors import BadValueError, ColumnError, ConflictError
from atoll.tasks.chat import (
    Segment,
    as_messages,
    chat_closing,
    chat_prompt,
    chat_segments,
    extras_of,
    last_alone,
    last_answer,
    with_answer,
)
from atoll.tasks.chats.template import Message
from atoll.tasks.chats.turns import said as text_of
from atoll.tasks.forms.conversations import Conversation, conversation, is_list
from atoll.tasks.forms.usual import example, names_that_are_known, told, usual_form
from atoll.tasks.forms.values import as_text, class_of
from atoll.tasks.readers.nearest import did_you_mean, few_names
from atoll.tasks.rows import RowProblem, Rows
from atoll.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, object]
_LOOKED_AT = 1000
"""Rows in which the first value of a column is sought."""


@dataclass(frozen=True, slots=True)
class Template:
    """Literal texts and columns in turn; a part with a column may take only its first characters."""

    parts: tuple[tuple[str, str | None, int | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it names, in order."""
        return tuple(column for _, column, _ in self.parts if column is not None)

    def render(self, row: Row) -> str:
        """The text of one row.

        Raises: RowProblem where a value is missing or no text.
        """
        return "".join(literal + ("" if column is None else as_text(row, column)[:limit]) for literal, column, limit in self.parts)


@dataclass(frozen=True, slots=True)
class Classes:
    """Where the class of a row stands, and which there are."""

    column: str
    labels: tuple[str, ...]

    def number(self, row: Row) -> int:
        """The row's class, counted from 0.

        Raises: RowProblem where it has none, or one that is not among the labels.
        """
        label = class_of(row, self.column)
        if label not in self.labels:
            expected = f"one of the {counted(len(self.labels), 'class')} of the training rows, or of [evaluate] labels"
            raise RowProblem(repr(label[:60]), expected, self.column)
        return self.labels.index(label)


@dataclass(frozen=True, slots=True)
class TextForm:
    """How rows of one data set are written, with loss on the completion, on everything, or on the assistant's turns."""

    kind: Literal["completion", "text", "messages"]
    prompt: Template | None = None
    completion: Template | None = None
    """With kind "text": the whole text."""
    without_input: Template | None = None
    """The prompt of rows whose column `optional` is empty (instruction data)."""
    optional: str = ""
    messages: tuple[str, ...] = ()
    """Columns of messages; of two, the first is what the second answers."""
    note: str = ""
    """What is to be told of it, where the names of the columns alone decided."""
    only_last: bool = False
    """Of messages: whether the assistant's last turn alone carries loss."""
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)
    """Of messages: variables of the chat template, beside those of a row."""
    classes: Classes | None = None
    """With kind "text": what is told of the whole text, instead of predicting it."""

    @property
    def adds_special_tokens(self) -> bool:
        """Whether begin and end tokens are added; a chat template writes its own."""
        return self.kind != "messages"

    @property
    def columns(self) -> frozenset[str]:
        """All columns that it uses."""
        templates = (self.prompt, self.completion, self.without_input)
        labels = () if self.classes is None else (self.classes.column,)
        return frozenset((*self.messages, *labels, *(name for one in templates if one is not None for name in one.columns)))

    def segments(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[Segment, ...]:
        """The row's text in pieces with and without loss.

        Raises: RowProblem; TokenizerError where messages meet a tokenizer without a chat template.
        """
        if self.kind == "messages":
            said = conversation(row, self.messages)
            messages, learned = self._messages(said), said.learned
            if self.only_last:
                learned = tuple(a and b for a, b in zip(learned, last_alone(messages), strict=True))
            return chat_segments(messages, tokenizer, extras_of(row, self.settings), learned=None if all(learned) else learned)
        assert self.completion is not None
        answer = Segment(self.completion.render(row), True)
        return (answer,) if self.kind == "text" else (Segment(self.prompt_text(row, tokenizer), False), answer)

    def segments_with(self, row: Row, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Segment, ...]:
        """The same with another completion (or another last answer of the assistant).

        Raises: RowProblem, ConflictError, TokenizerError.
        """
        if self.kind == "messages":
            answered = with_answer(self._messages(conversation(row, self.messages)), completion)
            return chat_segments(answered, tokenizer, extras_of(row, self.settings), learned=last_alone(answered))
        return (Segment(self.prompt_text(row, tokenizer), False), Segment(completion, True))

    def prompt_text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the model is given before it answers.

        Raises: RowProblem; ConflictError for plain text, which has no prompt.
        """
        if self.kind == "messages":
            return chat_prompt(self._messages(conversation(row, self.messages)), tokenizer, extras_of(row, self.settings))
        if self.prompt is None:
            raise ConflictError(
                "plain text has no prompt to answer", where="[data] text", got="text", expected="prompt and completion, or messages",
                do="set prompt and completion in [data], or leave the metrics that generate or choose out of [evaluate] metrics",
            )  # fmt: skip
        short = self.without_input is not None and not str(row.get(self.optional) or "").strip()
        return (self.without_input if short and self.without_input else self.prompt).render(row)

    def reference(self, row: Row) -> str:
        """The completion (or the assistant's last answer) that the row holds.

        Raises: RowProblem.
        """
        if self.kind == "messages":
            return last_answer(self._messages(conversation(row, self.messages)))
        assert self.completion is not None
        return self.completion.render(row)

    def closing(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What ends an answer, where that is not the tokenizer's end token but what a chat template writes.

        Raises: TokenizerError.
        """
        return chat_closing(tokenizer, self.settings) if self.kind == "messages" else ""

    def question(self, row: Row) -> str:
        """What a person gives a model that was trained on such rows: a prompt, or what the user says before the last answer.

        Raises: RowProblem where the row has none.
        """
        if self.kind == "messages":
            messages = self._messages(conversation(row, self.messages))
            asked = [message for message, is_last in zip(messages, last_alone(messages)[1:], strict=False) if is_last]
            if asked and asked[0]["role"] == "user":
                return text_of(asked[0])
        elif self.prompt is not None:
            return self.prompt.render(row)
        raise RowProblem("no question", "a prompt")

    def _messages(self, said: Conversation) -> tuple[Message, ...]:
        return as_messages(list(said.messages), self.messages[-1])

    def as_completion(self, answer: str) -> str:
        """A label or choice as a completion: put in the place of the completion template's column where it has exactly one."""
        if self.kind == "completion" and self.completion is not None and len(set(self.completion.columns)) == 1:
            return self.completion.render({self.completion.columns[0]: answer})
        return answer


def text_form(data: Data, columns: Sequence[str], first: Row | None = None) -> TextForm:
    """The form that [data] asks for; where it asks for none, the one that the column names, and the `first` row's values, suggest.

    Raises: ConflictError, ColumnError, BadValueError.
    """
    _check_combination(data)
    form = _form(data, columns, first)
    chat_keys = {"train_on": data.train_on != "all", "chat_template_kwargs": data.chat_template_kwargs is not None}
    asked = [key for key, is_set in chat_keys.items() if is_set]
    if form.kind == "messages":
        return replace(form, only_last=data.train_on == "last", settings=chat_settings(data))
    if asked:
        raise ConflictError(
            "this is said of chats, and the rows are none", where=f"[data] {asked[0]}", got=f"columns {few_names(columns)}",
            expected="a column of messages", do=f"name it with messages in [data], or leave {' and '.join(asked)} out",
        )  # fmt: skip
    return form


def _form(data: Data, columns: Sequence[str], first: Row | None) -> TextForm:
    if data.messages is not None:
        check_column(data.messages, columns, "[data] messages")
        return TextForm("messages", messages=(data.messages,))
    if data.text is not None:
        return TextForm("text", completion=_used(parse_template(data.text, columns, "[data] text"), "[data] text"))
    if data.prompt is not None and data.completion is not None:
        prompt = parse_template(data.prompt, columns, "[data] prompt")
        return TextForm("completion", prompt, _used(parse_template(data.completion, columns, "[data] completion"), "[data] completion"))
    return _usual_form(columns, first or {})


def chat_settings(data: Data) -> Mapping[str, object]:
    """[data] chat_template_kwargs as an object.

    Raises: BadValueError.
    """
    try:
        return extras_of({"chat_template_kwargs": data.chat_template_kwargs}).settings
    except RowProblem as problem:
        raise BadValueError(
            "this is no object of variables of a chat template", where="[data] chat_template_kwargs", got=problem.got,
            expected=problem.expected, do="write them as JSON",
        ) from None  # fmt: skip


def row_form(data: Data, rows: Rows) -> TextForm:
    """The form of these rows; where they have a label, of the text that is classified.

    Raises: as text_form.
    """
    first = {name: next((value for value in rows.column(name)[:_LOOKED_AT] if value is not None), None) for name in rows.columns}
    if data.label is None:
        return text_form(data, rows.columns, first)
    check_column(data.label, rows.columns, "[data] label")
    given = data.text or ("{text}" if "text" in rows.columns else None)
    is_said = given or data.prompt or data.completion or data.messages or usual_form(rows.columns)
    form = text_form(data.model_copy(update={"text": given, "label": None}), rows.columns, first) if is_said else None
    if form is None or form.kind != "text":
        texts = [name for name in rows.columns if name != data.label and isinstance(first[name], str)]
        raise ConflictError(
            "it is not said which text is to be classified", where="[data] text", got=f"columns {few_names(rows.columns)}",
            expected="a template", do=f'write text = "{{{texts[0]}}}" below [data]' if texts else "give rows with a column of texts",
        )  # fmt: skip
    return form


def parse_template(template: str, columns: Sequence[str], where: str) -> Template:
    """A template over known columns.

    Raises: BadValueError, ColumnError.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as problem:
        raise _template_error(where, f"{template!r}: {problem}") from None
    parts: list[tuple[str, str | None, int | None]] = []
    for literal, name, width, conversion in pieces:
        if name is None:
            parts.append((literal, None, None))
            continue
        whole = f"{name}{'!' + conversion if conversion else ''}{':' + width if width else ''}"
        if whole in columns and (conversion or width):  # "Question: text" is a column's name here, no width.
            name, conversion, width = whole, None, ""
        if not name or conversion or (width and not (width[0] == "." and width[1:].isdecimal())):
            raise _template_error(where, f"{{{whole}}} in {template!r}")
        check_column(name, columns, where)
        parts.append((literal, name, int(width[1:]) if width else None))
    return Template(tuple(parts))


def _check_combination(data: Data) -> None:
    given = [name for name in ("prompt", "completion", "text", "messages") if getattr(data, name) is not None]
    if given in ([], ["prompt", "completion"], ["text"], ["messages"]):
        return
    lone = given in (["prompt"], ["completion"])
    raise ConflictError(
        f"{given[0]} stands alone" if lone else "several ways of writing a row exclude each other", where="[data]", got=" and ".join(given),
        expected="prompt and completion; or text; or messages",
        do=f"set {'completion' if given == ['prompt'] else 'prompt'} too, or use text" if lone else "keep one of the three ways",
    )  # fmt: skip


def _usual_form(columns: Sequence[str], first: Row) -> TextForm:
    found = usual_form(columns)
    if found is None:
        raise ConflictError(
            "it is not said how a row becomes text", where="[data]", got=f"columns {few_names(columns)}",
            expected=f"prompt and completion, or text, or messages; or columns called so, or one of: {names_that_are_known()}",
            do=f"set for example {example(columns, first)}" if columns else "give data with columns",
        )  # fmt: skip
    is_pair = found.columns == ("prompt", "completion")
    is_chat = found.completion is None or (is_pair and all(is_list(first.get(name)) for name in found.columns))
    note = told(found, columns, is_chat=is_chat)
    if is_chat:
        return TextForm("messages", messages=found.columns, note=note)
    texts = (found.prompt, found.completion, found.short)
    prompt, completion, short = (None if text is None else parse_template(text, columns, "[data]") for text in texts)
    return TextForm("text" if prompt is None else "completion", prompt, completion, short, found.optional, note=note)


def _used(template: Template, where: str) -> Template:
    if template.columns:
        return template
    raise BadValueError(
        "a template that uses no column writes the same for every row", where=where, got="no {column}",
        expected='at least one column, as " {ref}"',
        do="name the column that holds the text",
    )  # fmt: skip


def check_column(name: str, columns: Sequence[str], where: str) -> None:
    """Whether the data has a column.

    Raises: ColumnError.
    """
    if name not in columns:
        listed = few_names(columns)
        raise ColumnError(
            "the data has no such column", where=where, got=name, expected=f"one of {listed}",
            do=did_you_mean(name, columns, f"use one of {listed}; a brace itself is written {{{{"),
        )  # fmt: skip


def _template_error(where: str, got: str) -> BadValueError:
    return BadValueError(
        "the template cannot be understood", where=where, got=got,
        expected='column names in braces, "{mr} ->", or "{text:.800}" for 800 characters',
        do="write {{ and }} for braces themselves",
    )  # fmt: skip
