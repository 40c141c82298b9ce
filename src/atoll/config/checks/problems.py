"""What the schema refused, as error pages: file, line, key, got, expected, and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from atoll.config.document import Document, Location, nearest
from atoll.config.keys import Key, as_toml, keys, section_names
from atoll.config.named import Named
from atoll.errors import BadValueError, InputError, UnknownKeyError
from atoll.registry.plugins import installed, meant

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# What the same thing is called in the tools people come from.
_ALIASES = {
    "lr": "train.learning_rate", "epochs": "train.local_epochs", "num_train_epochs": "train.local_epochs", "steps": "train.local_steps",
    "max_steps": "train.local_steps", "per_device_train_batch_size": "train.batch_size", "gradient_accumulation_steps": "train.accumulate",
    "max_grad_norm": "train.grad_clip", "lr_scheduler_type": "train.schedule", "r": "adapter.rank", "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout", "target_modules": "adapter.targets", "model_name_or_path": "model.base", "dtype": "model.precision",
    "max_seq_length": "data.max_length", "num_rounds": "run.rounds", "num_server_rounds": "run.rounds",
}  # fmt: skip


def problems(error: ValidationError, document: Document) -> list[InputError]:
    """One leaf for each place the schema refused, in the order of the file's sections."""
    found: dict[Location, InputError] = {}
    for item in error.errors(include_url=False):
        location = _location(item["loc"])
        if item["type"] == "extra_forbidden":
            found[item["loc"]] = _unknown(item["loc"], item["input"], document)
        elif location not in found:  # a union reports once for each of its members
            found[location] = _bad(location, item, document)
    return list(found.values())


def _location(raw: Sequence[str | int]) -> Location:
    """The part of pydantic's location that the file has: no names of union members, no positions in a list of values."""
    size = 1
    # A position in a list of values is no place of its own: of a list with a wrong item pydantic says that it is too short as well.
    while size < len(raw) and (size == 1 if isinstance(raw[size], int) else _path(raw[: size + 1]) in keys()):
        size += 1
    return tuple(raw[:size])


def _path(location: Sequence[str | int]) -> str:
    """The key's path in the schema: an edge's number does not belong to it."""
    return ".".join(part for part in location if isinstance(part, str))


def _bad(location: Location, item: Mapping[str, Any], document: Document) -> BadValueError:
    where, dotted = document.where(location), document.dotted(location)
    key = keys().get(_path(location))
    if key is None:
        return _bad_table(location, document)
    if item["type"] == "missing":
        return BadValueError(f"{dotted} is missing", where=where, got="nothing", expected=key.expected, do=f"add {key.name} = ... there")
    written = _written(document.table, location)
    default = f" (default {as_toml(key.default)})" if key.default is not None else ""
    what = f"{dotted} cannot be {_short(written)}"
    do = (_part_that_was_meant(key.named, written) if key.named is not None else None) or _advice(key, written)
    names = installed(key.named.kind) if key.named is not None else ()
    expected = f"{key.expected}{default}" + (f"; installed: {', '.join(map(as_toml, names))}" if names else "")
    return BadValueError(what, where=where, got=_short(written), expected=expected, do=do)


def _bad_table(location: Location, document: Document) -> BadValueError:
    name = str(location[0])
    written = _written(document.table, location)
    brackets = "[[edge]]" if name == "edge" else f"[{name}]"
    got = f"[{name}]" if isinstance(written, dict) else f"[[{name}]]" if _is_tables(written) else f"{name} = {_short(written)}"
    do = "write [[edge]] once for each edge, with its name below" if name == "edge" else f"write {brackets} and its keys below it"
    return BadValueError(f"{name} must be written as {brackets}", where=document.where(location), got=got, expected=brackets, do=do)


def _unknown(raw: Location, value: object, document: Document) -> UnknownKeyError:
    name, section = str(raw[-1]), _path(raw[:-1])
    if not section:
        return _unknown_section(name, value, document)
    known = [key.name for key in keys().values() if key.section == section]
    likely = nearest(name, known)
    home = _home(name)
    if likely:
        do = f"did you mean {likely}?"
    elif home:
        do = f"did you mean {home}?"
    else:
        do = f"take {name} out, or write one of the keys above"
    title = f"[[{section}]]" if section == "edge" else f"[{section}]"
    return UnknownKeyError(
        f"{title} has no key {name!r}", where=document.where(raw), got=name, expected=f"one of {', '.join(known)}", do=do
    )


def _unknown_section(name: str, value: object, document: Document) -> UnknownKeyError:
    known = list(section_names())
    home = _home(name)
    is_table = isinstance(value, dict) or _is_tables(value)
    likely = nearest(name, known)
    if home and not is_table:
        section, _, key = home.rpartition(".")
        do = f"did you mean {key}, below [{section}]?"
    elif likely:
        do = f"did you mean {'[[edge]]' if likely == 'edge' else f'[{likely}]'}?"
    else:
        do = "take it out, or write it below one of the sections above"
    what = f"there is no section [{name}]" if is_table else f"{name!r} stands outside every section"
    return UnknownKeyError(what, where=document.where((name,)), got=name, expected=f"one of the sections {', '.join(known)}", do=do)


def _home(name: str) -> str | None:
    same = [path for path, key in keys().items() if key.name == name]
    return same[0] if same else _ALIASES.get(name)


def _part_that_was_meant(named: Named, written: object) -> str | None:
    for name in (one for one in (written if isinstance(written, list) else [written]) if isinstance(one, str)):
        known = [*named.choices, *installed(named.kind)]
        if name not in known and (likely := nearest(name, known)):
            return f"did you mean {as_toml(likely)}?"
        if name not in known and (reference := meant(name)):
            return f'did you mean "{reference}"? A module is named as Python imports it from the folder of run.toml'
    return None


def _advice(key: Key, written: object) -> str:
    name, expected = key.name, key.expected
    choices = [word.strip('"') for word in expected.removeprefix("one of ").split(", ")] if expected.startswith("one of ") else []
    likely = nearest(written, choices) if isinstance(written, str) else None
    if likely:
        return f"did you mean {as_toml(likely)}?"
    if isinstance(written, str) and "number" in expected and _NUMBER.fullmatch(written):
        return f"take the quotes away: {name} = {written}"
    if isinstance(written, int | float) and not isinstance(written, bool) and expected.startswith(("text", "letters")):
        return f'put quotes around it: {name} = "{written}"'
    return f"give {name} such a value" + ("" if key.required else ", or leave the key out for its default")


def _written(table: object, location: Location) -> object:
    for part in location:
        if isinstance(table, Mapping):
            table = table.get(str(part))
        elif isinstance(table, list) and isinstance(part, int):
            table = table[part]
    return table


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _short(value: object) -> str:
    text = as_toml(value) or "nothing"
    return text if len(text) <= 80 else text[:77] + "..."
