"""Parts by kind and name. A built-in part is registered as text, so that the table opens without the libraries that parts need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from atoll.errors import PartError
from atoll.registry.class_checks import check_class
from atoll.registry.kinds import KINDS, Kind


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One part that run.toml can name."""

    kind: Kind
    name: str
    target: str | type
    """Its class, or where it is: "module:object"."""
    summary: str = ""
    """One line for docs/configuration.md."""
    traits: Mapping[str, object] = field(default_factory=dict)
    """What its class says of itself, for a target that is not loaded yet."""
    origin: Path | None = None
    """The file of a part that is not built in."""

    @property
    def is_built_in(self) -> bool:
        """Whether it ships with Atoll."""
        return self.origin is None

    def trait(self, name: str) -> Any:
        """One of the attributes that KINDS lists for its kind."""
        default = self.kind.traits[name]
        if isinstance(self.target, str):
            return self.traits.get(name, default)
        return getattr(self.target, name, default)

    def resolve(self) -> type:
        """Its class."""
        if isinstance(self.target, type):
            return self.target
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)


_PARTS: dict[tuple[str, str], Part] = {}


def register(
    kind: str, name: str, target: str | type, summary: str = "", traits: Mapping[str, object] | None = None, origin: Path | None = None
) -> Part:  # fmt: skip
    """Make a part known under a name; one that is registered again takes the place of the first, but a built-in part stays what it is.

    Raises: PartError for a name that is a built-in part's, and for a class that is none of its kind.
    """
    known = _PARTS.get((kind, name))
    if known is not None and known.is_built_in:
        raise PartError(
            f"{name} is built in", where=KINDS[kind].key, got=f"another {kind} of that name", expected="a name of its own",
            do="give it another name",
        )  # fmt: skip
    if isinstance(target, type):
        check_class(KINDS[kind], name, target)
    part = Part(KINDS[kind], name, target, summary, traits or {}, origin)
    _PARTS[kind, name] = part
    return part


def names(kind: str) -> tuple[str, ...]:
    """Names of the built-in parts of a kind, in the order in which they were registered."""
    return tuple(name for (one, name), part in _PARTS.items() if one == kind and part.is_built_in)


def loaded() -> tuple[Part, ...]:
    """All parts that are not built in and were loaded."""
    return tuple(part for part in _PARTS.values() if not part.is_built_in)


def known(kind: str, name: str) -> Part | None:
    """The part of this name, where it is built in or was loaded before."""
    return _PARTS.get((kind, name))


def find(kind: str, name: str) -> Part:
    """The part of this name; those that are not built in were loaded with the config that names them.

    Raises: PartError where there is none: a name that came from somewhere else imports nothing.
    """
    part = _PARTS.get((kind, name))
    if part is None:
        raise PartError(
            f"no {kind} of this name is loaded", where=KINDS[kind].key, got=name, expected=f"one of {', '.join(names(kind))}",
            do="name it in run.toml, from where it is loaded",
        )  # fmt: skip
    return part


def trait(kind: str, name: str, attribute: str) -> Any:
    """What the part of this name says of itself; see KINDS.

    Raises: as `find`.
    """
    return find(kind, name).trait(attribute)


def make(kind: str, name: str, options: Mapping[str, object] | None = None, *arguments: object) -> Any:
    """A new object of the part with this name, made with the arguments of its kind and, where it has any, its options.

    Raises: as `find`; ValidationError of pydantic for options that its `Options` do not take.
    """
    made = find(kind, name).resolve()
    model = getattr(made, "Options", None)
    return made(*arguments) if model is None else made(*arguments, model.model_validate(dict(options or {})))



def wrong_result(kind: str, name: str, method: str, got: object, expected: str) -> PartError:
    """The page of a part whose method gave something else than it must; what it gave is shown as it is."""
    return PartError(
        f"{method} of the {kind} {name} gave {_shown(got)}", where=f"[{KINDS[kind].key.replace('.', '] ')}", got=_shown(got),
        expected=expected, do=f'see what it returns with atoll.testing.check("{kind}", ...)',
    )  # fmt: skip


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
