"""Conversations as people write them: messages, ShareGPT turns, texts in parts; and which turns say that they are not to be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atoll.parsed import parse_json
from atoll.tasks.rows import RowProblem

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant", "function": "function", "developer": "developer", "ipython": "ipython", "bot": "assistant",
    "prompter": "user",
}  # fmt: skip
"""What ShareGPT and its kin call who speaks."""
_AS_ROLE = {name: role for name, role in ROLES.items() if role in ("user", "assistant", "system") and name != "function_call"}
"""Names that count where a role is wanted, too; others, as "observation", are a template's own."""
_OTHERS = ("train_detail", "refusal", "audio", "images", "image", "videos", "video")
"""What messages may hold that is not done: parts of a turn alone, and what chat templates of text do not write."""
TEXT_PARTS = ("text", "input_text", "output_text")
LEARN = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_mask", "loss_weight", "learn")
"""Keys of a message by which its writer says whether it is learned."""
IGNORE = ("ignore", "mask", "masked", "skip")
"""Keys that say the opposite."""
_SAID: dict[object, bool] = {True: True, False: False, "true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with role and content, and for each whether it may be learned."""

    messages: tuple[Mapping[str, object], ...]
    learned: tuple[bool, ...]


def conversation(row: Mapping[str, object], columns: Sequence[str]) -> Conversation:
    """The messages of a row's columns, one behind the other. Of several columns the last alone is learned: the others are the prompt.

    Raises: RowProblem.
    """
    messages, learned = list[Mapping[str, object]](), list[bool]()
    for column in columns:
        for number, message in enumerate(_listed(row.get(column), column), start=1):
            if not isinstance(message, Mapping):
                raise RowProblem(f"message {number} is {str(message)[:60]!r}", 'an object with "role" and "content"', column)
            plain = {key: value for key, value in message.items() if value is not None}
            learned.append(_is_learned(plain, number, column) and column == columns[-1])
            messages.append(_without_flags(_by_role(plain, number, column)))
    return Conversation(tuple(messages), tuple(learned))


def is_list(value: object) -> bool:
    """Whether a value is a list of objects, or the JSON text of one."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = parse_json(value)
        except ValueError:
            return False
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _listed(value: object, column: str) -> Sequence[object]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as problem:
            raise RowProblem(f"broken JSON: {problem}"[:120], "a list of messages", column) from None
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not isinstance(value, list) or not value:
        raise RowProblem(f"a {type(value).__name__}" if value else "no messages", "a list of {role, content} or {from, value}", column)
    return value


def _by_role(message: dict[str, object], number: int, column: str) -> dict[str, object]:
    """A message with role and content; what else it has stays, for the chat template."""
    if "from" in message and "role" not in message:
        name = message.pop("from")
        role = ROLES.get(str(name).lower())
        if role is None:
            known = ", ".join(dict.fromkeys(ROLES))
            raise RowProblem(f"message {number} is from {str(name)[:40]!r}", f"one of {known}", column)
        value = message.pop("value", None)
        if name == "function_call":
            return {"role": role, "content": "", **message, "tool_calls": [_call(value, number, column)]}
        message = {"role": role, **({"content": value} if value is not None else {}), **message}
    called = message.get("role")
    if isinstance(called, str):
        message = {**message, "role": _AS_ROLE.get(called.strip().lower(), called)}
    if "function_call" in message:
        call = message.pop("function_call")
        if message.get("tool_calls"):
            raise RowProblem(f"message {number} with function_call beside tool_calls", "one of the two", column)
        message["tool_calls"] = [_call(call, number, column)]
    for name in _OTHERS:
        if message.get(name):
            raise RowProblem(f"message {number} with {name}", "role, content, tool_calls and reasoning", column)
    content = message.get("content")
    return {**message, "content": _joined(content, number, column)} if isinstance(content, list) else message


def _joined(parts: Sequence[object], number: int, column: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise RowProblem(f"message {number} has a part of type {str(kind)[:40]!r}", "parts of type text", column)
        texts.append(text)
    return "".join(texts)


def _call(value: object, number: int, column: str) -> object:
    try:
        call = parse_json(value) if isinstance(value, str) else value
    except ValueError:
        call = None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise RowProblem(f"message {number} is a call {str(value)[:60]!r}", 'JSON with "name" and "arguments"', column)
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _is_learned(message: Mapping[str, object], number: int, column: str) -> bool:
    """What the message says of itself; what says nothing is learned.

    Raises: RowProblem for a word or a weight that is neither yes nor no.
    """
    learned = True
    for key in (*LEARN, *IGNORE):
        if key not in message:
            continue
        value = message[key]
        said = _SAID.get(value.strip().lower() if isinstance(value, str) else value if isinstance(value, int | float) else None)
        if said is None:
            raise RowProblem(f"message {number} with {key} = {str(value)[:40]}", "1 or 0, true or false: a turn is learned or not", column)
        learned = learned and (said if key in LEARN else not said)
    return learned


def _without_flags(message: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in message.items() if key not in (*LEARN, *IGNORE)}
