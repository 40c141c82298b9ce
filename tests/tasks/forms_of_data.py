"""Rows as people of this world have them, and what is trained on: the table of docs/data.md (python -m tests.tasks.forms_of_data)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atoll.config.schema import Data
from atoll.errors import InputError
from atoll.tasks.rows import load_rows
from atoll.tasks.text import row_form
from atoll.tasks.tokens import skip_or_raise

from tests.tasks.letters import letters_tokenizer

Row = Mapping[str, object]
USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CHAT = (("<|user|>q</s><|assistant|>", "a</s>"),)


@dataclass(frozen=True)
class Form:
    """A row, and its text in pairs: without loss and with it. Or what the refusal says."""

    row: Row
    taken: tuple[tuple[str, str], ...] = ()
    refused: str = ""
    data: Mapping[str, object] = field(default_factory=dict)


FORMS: dict[str, Form] = {
    "prompt, completion": Form({"prompt": "q", "completion": "a"}, (("q", "a"),)),
    "the same as lists of messages (TRL)": Form({"prompt": [USER], "completion": [BOT]}, CHAT),
    "a prompt with an answer of its own, as messages": Form(
        {"prompt": [USER, BOT, USER], "completion": [BOT]}, (("<|user|>q</s><|assistant|>a</s><|user|>q</s><|assistant|>", "a</s>"),)
    ),
    "messages": Form({"messages": [USER, BOT]}, CHAT),
    "messages, as JSON text": Form({"messages": json.dumps([USER, BOT])}, CHAT),
    "messages in another column": Form({"chat": [USER, BOT]}, CHAT, data={"messages": "chat"}),
    "several answers": Form({"messages": [USER, BOT, USER, BOT]}, CHAT * 2),
    "content in parts of text (OpenAI)": Form(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": ["a"]}]}, CHAT
    ),
    "content with an image": Form({"messages": [{"role": "user", "content": [{"type": "image"}]}, BOT]}, refused="part of type 'image'"),
    "ShareGPT": Form({"conversations": [HUMAN, GPT]}, CHAT),
    "ShareGPT with a system turn": Form(
        {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, (("<|system|>s</s><|user|>q</s><|assistant|>", "a</s>"),)
    ),
    "conversations of role and content": Form({"conversations": [USER, BOT]}, CHAT),
    "messages of a human and a GPT, in any letters": Form(
        {"messages": [{"role": "Human", "content": "q"}, {"role": "gpt", "content": "a"}]}, CHAT
    ),
    "a call as OpenAI once had it, which this template does not write": Form(
        {"messages": [USER, {**BOT, "function_call": {"name": "f", "arguments": "{}"}}]}, refused="of whose tool_calls"
    ),
    "a refusal (OpenAI)": Form({"messages": [USER, {"role": "assistant", "refusal": "no"}]}, refused="refusal"),
    "ShareGPT with somebody unknown": Form({"conversations": [{"from": "parrot", "value": "q"}, GPT]}, refused="from 'parrot'"),
    "an answer with weight 0 (OpenAI)": Form(
        {"messages": [USER, {**BOT, "weight": 0}, USER, {**BOT, "weight": 1}]},
        (("<|user|>q</s><|assistant|>a</s><|user|>q</s><|assistant|>", "a</s>"),),
    ),
    "an answer with train = false (Axolotl)": Form(
        {"conversations": [HUMAN, GPT, HUMAN, {**GPT, "train": False}]}, (*CHAT, ("<|user|>q</s><|assistant|>a</s>", "")),
    ),
    "an answer of which parts are trained (Axolotl)": Form(
        {"messages": [USER, {**BOT, "train_detail": [{"train": True}]}]}, refused="train_detail"
    ),
    "an answer with weight 0.5": Form({"messages": [USER, {**BOT, "weight": 0.5}]}, refused="weight = 0.5"),
    "instruction, input, output (Alpaca)": Form(
        {"instruction": "q", "input": "i", "output": "a"}, (("... ### Instruction: q ### Input: i ### Response: ", "a"),)
    ),
    "the same with an empty input": Form(
        {"instruction": "q", "input": "", "output": "a"}, (("... ### Instruction: q ### Response: ", "a"),)
    ),
    "instruction, context, response (Dolly)": Form(
        {"instruction": "q", "context": "c", "response": "a"}, (("... ### Instruction: q ### Input: c ### Response: ", "a"),)
    ),
    "system_prompt, question, response (Open-Orca)": Form({"system_prompt": "s", "question": "q", "response": "a"}, (("s q ", "a"),)),
    "the same without a system prompt": Form({"system_prompt": "", "question": "q", "response": "a"}, (("q ", "a"),)),
    "question, response": Form({"question": "q", "response": "a"}, (("q ", "a"),)),
    "instruction, output": Form({"instruction": "q", "output": "a"}, (("... ### Instruction: q ### Response: ", "a"),)),
    "instruction, response": Form({"instruction": "q", "response": "a"}, (("... ### Instruction: q ### Response: ", "a"),)),
    "question, answer": Form({"question": "q", "answer": "a"}, (("Question: q Answer:", " a"),)),
    "prompt, response": Form({"prompt": "q", "response": "a"}, (("q ", "a"),)),
    "query, response": Form({"query": "q", "response": "a"}, (("q ", "a"),)),
    "input, output": Form({"input": "q", "output": "a"}, (("q ", "a"),)),
    "mr, ref (E2E)": Form({"mr": "q", "ref": "a"}, (("q ->", " a"),)),
    "text": Form({"text": "a"}, (("", "a"),)),
    "any columns, with templates": Form({"x": "q", "y": "a"}, (("Q: q", " a"),), data={"prompt": "Q: {x}", "completion": " {y}"}),
    "columns with colons": Form({"Question: text": "q", "A": "a"}, (("q", "a"),), data={"prompt": "{Question: text}", "completion": "{A}"}),
    "other columns, without": Form({"x": "q", "y": "a"}, refused="columns x, y"),
    "a number": Form({"prompt": 1.5, "completion": 7}, (("1.5", "7"),)),
    "a list where a text is wanted": Form({"prompt": ["q"], "completion": "a"}, refused="a list"),
    "null, a missing key, an empty CSV value": Form({"prompt": "q", "completion": None}, refused="no value"),
    "a key twice in one JSON object": Form({"prompt": "q", "completion": "a", "twice": ...}, refused="twice"),
    'a column split = "test"': Form({"text": "a", "split": "test"}, refused="'test'; 1 of 1 row"),
    "a column train = false": Form({"text": "a", "train": False}, refused="False; 1 of 1 row"),
    "a column weight = 0": Form({"text": "a", "weight": 0}, refused="0; 1 of 1 row"),
    "a column consent = no": Form({"text": "a", "consent": "no"}, refused="'no'; 1 of 1 row"),
}


def outcome(form: Form, folder: Path) -> tuple[tuple[str, str], ...] | str:
    """The text of the row in pairs, or what a refusal got."""
    from atoll.tasks.forms.flags import check_flags
    from atoll.tasks.rows import RowProblem

    text = json.dumps({name: value for name, value in form.row.items() if value is not ...})
    (folder / "row.jsonl").write_text((text[:-1] + ', "prompt": "q"}' if ... in form.row.values() else text) + "\n")
    try:
        rows = load_rows("row.jsonl", base_dir=folder, limit=None, on_bad_row="error")
        made = row_form(Data.model_validate(form.data), rows)
        check_flags(rows, made.columns)
        try:
            segments = made.segments(rows[0], letters_tokenizer())
        except RowProblem as problem:
            skip_or_raise(rows, 0, problem)
    except InputError as problem:
        return problem.got
    pairs: list[list[str]] = [["", ""]]
    for segment in segments:
        if not segment.has_loss and pairs[-1][1]:
            pairs.append(["", ""])
        pairs[-1][segment.has_loss] += segment.text
    return tuple((shown(before), shown(after)) for before, after in pairs if before or after)


def shown(text: str) -> str:
    """On one line, and the usual introduction of instructions cut short."""
    begin = text.find("### Instruction")
    return " ".join(("... " + text[begin:] if begin > 0 else text).replace("\n\n", "\n").split("\n"))


def table() -> str:
    """The forms of rows as Markdown."""
    lines = ["| a row such as | is taken as |", "|---|---|"]
    for name, form in FORMS.items():
        pieces = " ".join(part for before, after in form.taken for part in (_code(before), f"**{_code(after)}**" if after else "") if part)
        said = "; ".join(f'`{key} = "{value}"`' for key, value in form.data.items())
        cell = f"refused: {_plain(form.refused)}" if form.refused else pieces
        lines.append(f"| {_plain(name)}{', ' + said if said else ''} | {cell} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(table(), end="")
