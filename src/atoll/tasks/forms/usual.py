"""Rows whose columns say by their names how they become text: what is taken for what, first match first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{%s}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class UsualForm:
    """Columns that are known together, and the templates that they stand for; without a completion, messages."""

    columns: tuple[str, ...]
    prompt: str | None = None
    completion: str | None = None
    short: str | None = None
    """The prompt of rows whose column `optional` is empty."""
    optional: str = ""
    known_as: str = ""


USUAL = (
    UsualForm(("prompt", "completion"), "{prompt}", "{completion}", known_as="prompt and completion, as texts or as lists of messages"),
    UsualForm(("messages",), known_as="chat messages"),
    UsualForm(("conversations",), known_as="ShareGPT"),
    UsualForm(("conversation",), known_as="ShareGPT"),
    UsualForm(("instruction", "input", "output"), _ALPACA_INPUT % "input", "{output}", _ALPACA, "input", "Alpaca"),
    UsualForm(("instruction", "context", "response"), _ALPACA_INPUT % "context", "{response}", _ALPACA, "context", "Dolly"),
    UsualForm(
        ("system_prompt", "question", "response"), "{system_prompt}\n\n{question}\n", "{response}", "{question}\n", "system_prompt",
        "Open-Orca",
    ),
    UsualForm(("instruction", "output"), _ALPACA, "{output}", known_as="Alpaca without input"),
    UsualForm(("instruction", "response"), _ALPACA, "{response}", known_as="instruction and response"),
    UsualForm(("mr", "ref"), "{mr} ->", " {ref}", known_as="E2E"),
    UsualForm(("question", "answer"), "Question: {question}\nAnswer:", " {answer}", known_as="question and answer"),
    UsualForm(("question", "response"), "{question}\n", "{response}", known_as="question and response"),
    UsualForm(("prompt", "response"), "{prompt}\n", "{response}", known_as="prompt and response"),
    UsualForm(("query", "response"), "{query}\n", "{response}", known_as="query and response"),
    UsualForm(("input", "output"), "{input}\n", "{output}", known_as="input and output"),
    UsualForm(("text",), None, "{text}", known_as="plain text"),
)
_OF_CHATS = {"tools", "functions", "documents"}
"""Columns that a chat template gets."""
_MEANT = {"system", "system_prompt", "history", "context", "input", "image", "images", "chosen", "rejected", "label", "labels", *_OF_CHATS}
"""Columns that somebody hardly fills for nothing."""
_NAMES_NOTHING = re.compile(r"(?i)(.*[_ ])?(id|idx|index|uuid|url|date|source|split|lang|language|category|type|rejected|unnamed.*)|")
"""Names of columns that are hardly what is to be learned."""
_PLAIN = ({"prompt", "completion"}, {"messages"}, {"mr", "ref"}, {"text"})


def usual_form(columns: Sequence[str]) -> UsualForm | None:
    """The first usual form whose columns are all there."""
    return next((form for form in USUAL if set(columns).issuperset(form.columns)), None)


def example(columns: Sequence[str], first: Mapping[str, object]) -> str:
    """What could be written below [data] for columns of names that are not known, by the first row's values."""
    chats = [name for name in columns if isinstance(first.get(name), list) and first[name] and isinstance(first[name][0], Mapping)]  # type: ignore[index]
    if chats:
        return f'messages = "{chats[0]}"'
    texts = [name for name in columns if isinstance(first.get(name, ""), str) and not _NAMES_NOTHING.fullmatch(name)] or list(columns)
    one, other = (f"{{{name}}}" for name in (*texts, texts[0])[:2])
    return f'text = "{one}"' if len(texts) < 2 else f'prompt = "{one}\\n" and completion = "{other}"'


def told(form: UsualForm, columns: Sequence[str], *, is_chat: bool) -> str:
    """What is to be told of rows that are written by the names of their columns; nothing where it is as plain as day."""
    others = [one for one in USUAL if one is not form and set(columns).issuperset(one.columns) and not set(one.columns) & set(form.columns)]
    unused = sorted((set(columns) - set(form.columns)) & (_MEANT - _OF_CHATS if is_chat else _MEANT))
    if set(form.columns) in _PLAIN and not others and not unused:
        return ""
    taken = f"rows are taken as {form.known_as}, by their columns {', '.join(form.columns)}"
    if form.prompt is not None and form.completion is not None:
        taken += f": prompt = {_short(form.prompt)}, completion = {_short(form.completion)}"
    taken += f"; {', '.join(others[0].columns)} is there, too" if others else ""
    taken += f"; not used: {', '.join(unused)}" if unused else ""
    return taken + ". [data] says otherwise if you do"


def _short(template: str) -> str:
    text = repr(template)
    return text if len(text) <= 60 else f"{text[:25]} ... {text[-25:]}"


def names_that_are_known(usual: Sequence[UsualForm] = USUAL) -> str:
    """The columns of all usual forms, for messages."""
    return "; ".join(" ".join(form.columns) for form in usual)
