"""Every key of run.toml as a value: its path, what it takes in plain words, its default and its description, read off the schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from atoll.config import quantities, schema
from atoll.config.named import REFERENCE, Named

_QUANTITIES = (
    (quantities.Bytes, "a size above 0, such as '2 GB' or '512 MiB'"),
    (quantities.BytesOrZero, "a size such as '2 GB' or '512 MiB'"),
    (quantities.BitsPerSecond, "a rate above 0, such as '100 Mbit/s' or '10 MB/s'"),
    (quantities.FlopsPerSecond, "a speed above 0, such as '500 GFLOP/s'"),
    (quantities.Seconds, "a time above 0, such as '20 ms', '60 s' or '1 h'"),
    (quantities.SecondsOrZero, "a time such as '20 ms', '60 s' or '1 h'"),
    (schema.Name, "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 64"),
)
OPTIONS = "options"
"""The table whose tables are parts' own: its keys are theirs to check."""
_PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `path` is "train.learning_rate" or "edge.memory"; `default` is None where nothing is set."""

    path: str
    expected: str
    default: object
    required: bool
    description: str
    text_only: bool
    named: Named | None = None
    """Of what kind the parts are that it names."""

    @property
    def section(self) -> str:
        """The table the key stands in: "train", "edge", "model.cut"."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The key's last name."""
        return self.path.rpartition(".")[2]


@cache
def keys() -> Mapping[str, Key]:
    """All keys by path, in the order of the schema."""
    found: dict[str, Key] = {}
    for name in section_names():
        if name != OPTIONS:
            _collect(section_class(name), name, found)
    return found


def section_names() -> tuple[str, ...]:
    """The top-level tables."""
    return tuple(schema.RunConfig.model_fields)


def section_class(name: str) -> type[schema.Section]:
    """The schema class behind a top-level table."""
    return schema.Edge if name == "edge" else type(schema.RunConfig.model_fields[name].default)


def as_toml(value: object) -> str:
    """A value as run.toml writes it; "" for nothing."""
    if value is None:
        return ""
    if isinstance(value, schema.Section):
        return as_toml(value.model_dump())
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {as_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def describe(hint: Any) -> str:
    """What a type annotation of the schema takes, in plain words."""
    for quantity, words in _QUANTITIES:
        if hint == quantity:
            return words
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, str):  # Of a model whose annotations are not evaluated.
        return hint
    if origin is Annotated:
        named = _named_in(hint)
        if named is not None and arguments[0] is str:
            listed = "one of " + ", ".join(as_toml(choice) for choice in named.choices) + " or " if named.choices else ""
            return f"{listed}{REFERENCE}"
        return describe(arguments[0]) + _limits(arguments[1:])
    if origin in (Union, UnionType):
        return " or ".join(describe(argument) for argument in arguments if argument is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(as_toml(choice) for choice in arguments) if len(arguments) > 1 else as_toml(arguments[0])
    if origin is tuple:
        return f"a list, each item {describe(arguments[0])}"
    return _PLAIN.get(hint, "a table")


def _collect(section: type[schema.Section], path: str, found: dict[str, Key]) -> None:
    hints = get_type_hints(section, include_extras=True)
    for name, field in section.model_fields.items():
        hint, here = hints[name], f"{path}.{name}"
        required = field.is_required()
        found[here] = Key(
            here, describe(hint), None if required else field.default, required, field.description or "", _takes_only_text(hint),
            _named_in(hint),
        )  # fmt: skip
        if isinstance(field.default, schema.Section):
            _collect(type(field.default), here, found)


def _takes_only_text(hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if any(hint == quantity for quantity, _ in _QUANTITIES[:-1]):
        return False
    if origin is Annotated:
        return _takes_only_text(arguments[0])
    if origin in (Union, UnionType):
        return all(_takes_only_text(argument) for argument in arguments if argument is not NoneType)
    return hint is str


def _limits(metadata: tuple[Any, ...]) -> str:
    words = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}", "min_length": "not empty"}
    rules = [rule for item in metadata for rule in getattr(item, "metadata", ())]
    said = [text.format(getattr(rule, name)) for rule in rules for name, text in words.items() if getattr(rule, name, None) is not None]
    return "".join(f", {text}" for text in said)


def _named_in(hint: Any) -> Named | None:
    """The mark of an annotation that takes names of parts."""
    for argument in get_args(hint):
        if isinstance(argument, Named):
            return argument
        if (found := _named_in(argument)) is not None:
            return found
    return None
