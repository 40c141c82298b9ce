"""The parts that a config names: which they are, loaded where they are somebody else's, and their own options checked like every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ValidationError

from atoll.config.document import Document, Location, nearest
from atoll.config.keys import as_toml, describe, keys
from atoll.config.schema import RunConfig
from atoll.errors import BadValueError, ConflictError, InputError, PartError, UnknownKeyError
from atoll.registry.parts import find
from atoll.registry.plugins import is_plugin, load_plugin


@dataclass(frozen=True, slots=True)
class NamedPart:
    """One place of a config that names a part."""

    kind: str
    name: str
    location: Location


def named_parts(config: RunConfig) -> list[NamedPart]:
    """All parts that a config names, in the order of its keys."""
    found = []
    for key in keys().values():
        if key.named is None or key.section == "edge":
            continue
        value: Any = config
        for step in key.path.split("."):
            value = getattr(value, step)
        for name in value if isinstance(value, tuple) else (value,):
            if name not in key.named.also:
                found.append(NamedPart(key.named.kind, name, tuple(key.path.split("."))))
    return found


def plugin_parts(config: RunConfig) -> list[NamedPart]:
    """Those of them that are not built in."""
    return [part for part in named_parts(config) if is_plugin(part.kind, part.name)]


def load_parts(config: RunConfig, document: Document, *, environment: bool = True) -> list[InputError]:
    """Load what is not built in, from the folder of the file or the environment, and check the options of all; what is wrong with them."""
    errors: list[InputError] = []
    for part in plugin_parts(config):
        try:
            load_plugin(part.kind, part.name, document.path.parent, environment=environment)
        except PartError as error:
            error.where = document.where(part.location)
            errors.append(error)
    return errors or _wrong_options(config, document)


def _wrong_options(config: RunConfig, document: Document) -> list[InputError]:
    parts = list({(part.kind, part.name): part for part in named_parts(config)}.values())
    # What is built in has its settings among the keys of its section, and does not have to be loaded here.
    targets = {part: find(part.kind, part.name) for part in parts}
    models = {part: None if target.is_built_in else getattr(target.resolve(), "Options", None) for part, target in targets.items()}
    told = {part.name for part in parts if models[part] is not None}  # Of two parts of one name one may have options.
    errors: list[InputError] = []
    for name in config.options:
        if name not in [part.name for part in parts]:
            errors.append(_nobodys(name, list(dict.fromkeys(part.name for part in parts)), document))
    for part in parts:
        name, given, model = part.name, config.options.get(part.name), models[part]
        if model is None:
            errors += [] if given is None or name in told else [_has_none(part, document)]
            continue
        try:
            model.model_validate(dict(given or {}))
        except ValidationError as error:
            title, location = f"[options.{as_toml(name)}]", ("options", name)
            errors += [wrong_key(title, location, model, item, document) for item in error.errors(include_url=False)]
    return errors


def _nobodys(name: str, named: Sequence[str], document: Document) -> UnknownKeyError:
    likely = nearest(name, list(named))
    return UnknownKeyError(
        f"[options.{as_toml(name)}] is of a part that this run does not name", where=document.where(("options", name)), got=name,
        expected=f"one of {', '.join(named)}", do=f"did you mean {likely}?" if likely else "take it out, or name the part where it belongs",
    )  # fmt: skip


def _has_none(part: NamedPart, document: Document) -> ConflictError:
    section = part.location[0]
    return ConflictError(
        f"{part.name} has no options of its own", where=document.where(("options", part.name)), got=f"[options.{as_toml(part.name)}]",
        expected=f"its settings in [{section}]", do=f"move them to [{section}], or take the table out",
    )  # fmt: skip


def wrong_key(title: str, table: Location, model: type[BaseModel], item: Mapping[str, Any], document: Document) -> InputError:
    """The page of what a model refused of a table with this title and place; `item` is one of the refusal's errors."""
    fields, key = model.model_fields, str(item["loc"][0]) if item["loc"] else ""
    location: Location = (*table, key)
    if item["type"] == "extra_forbidden":
        likely = nearest(key, list(fields))
        do = f"did you mean {likely}?" if likely else f"take {key} out"
        what, expected = f"{title} has no key {key!r}", f"one of {', '.join(fields)}" if fields else "no keys"
        return UnknownKeyError(what, where=document.where(location), got=key, expected=expected, do=do)
    if item["type"] == "missing":
        expected, do = _takes(model, key), f"add {key} = ... below {title}"
        return BadValueError(f"{title} needs {key}", where=document.where(table), got="nothing", expected=expected, do=do)
    if key not in fields:  # What the model says of all its fields together.
        return BadValueError(f"{title} cannot be so", where=document.where(table), got=str(item["msg"]), do="mend it")
    expected = _takes(model, key)
    # A rule of the part's own has its own words.
    expected = str(item["msg"]) if item["type"] in ("value_error", "assertion_error") else expected
    return BadValueError(
        f"{title} {key} cannot be {as_toml(item['input'])}", where=document.where(location), got=as_toml(item["input"]), expected=expected,
        do=f"give {key} such a value",
    )  # fmt: skip


def _takes(model: type[BaseModel], key: str) -> str:
    hint = get_type_hints(model, include_extras=True)[key]
    default = model.model_fields[key].default
    return describe(hint) + ("" if model.model_fields[key].is_required() or default is None else f" (default {as_toml(default)})")
