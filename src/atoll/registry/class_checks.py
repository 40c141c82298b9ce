"""What a class must be to be a part of its kind, as far as can be seen before it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping

from atoll.errors import PartError
from atoll.registry.kinds import Kind


def check_class(kind: Kind, name: str, target: type) -> None:
    """Whether a class has the methods of its kind, takes what it is given, and says of itself what can be said.

    Raises: PartError naming all that is wrong.
    """
    wrong = [*_methods(kind, target), *_making(kind, target), *_traits(kind, target)]
    if wrong:
        asked = ", ".join(kind.methods)
        raise PartError(
            f"{name} is no {kind.name}", where=f"{kind.key} = {name!r}", got=f"{target.__qualname__} {'; '.join(wrong)}",
            expected=f"a class with {asked}, as {kind.protocol} says",
            do=f"mend it; atoll.testing.check({kind.name!r}, ...) runs all that is asked of one",
        )  # fmt: skip


def wrong_methods(asked: Mapping[str, int], target: object) -> Iterator[str]:
    """What a class, or an object, has not of these methods, and which of them cannot be given so many arguments."""
    missing = [name for name in asked if not _has(target, name)]
    if missing:
        yield f"without {', '.join(missing)}"
    for name in (name for name in asked if name not in missing):
        method = getattr(target, name)
        is_bound = isinstance(inspect.getattr_static(target, name), staticmethod | classmethod)
        if not isinstance(target, type):
            is_bound, method = not hasattr(method, "__func__"), getattr(method, "__func__", method)
        if not _takes(method, asked[name] if is_bound else asked[name] + 1):
            yield f"whose {name}{_signature(method)} cannot be given {_arguments(asked[name])}"


def _methods(kind: Kind, target: type) -> Iterator[str]:
    asked = dict(kind.methods)
    for trait, methods in kind.trait_methods.items():
        asked |= methods if getattr(target, trait, kind.traits[trait]) is True else {}
    yield from wrong_methods(asked, target)


def _has(target: object, name: str) -> bool:
    """Whether there is such a method, and not just what a Protocol or an abstract class says of one."""
    if not callable(getattr(target, name, None)):
        return False
    classes = (target if isinstance(target, type) else type(target)).__mro__
    home = next((one for one in classes if name in vars(one)), None)
    return not getattr(home, "_is_protocol", False) and name not in getattr(target, "__abstractmethods__", ())


def _making(kind: Kind, target: type) -> Iterator[str]:
    options = getattr(target, "Options", None)
    if options is not None and not kind.has_options:
        yield f"with Options, which no {kind.name} is given"
    elif options is not None and not _is_options(options):
        yield "with Options that are not made from atoll.registry.options.Options"
    count = kind.made_with + (1 if options is not None and kind.has_options else 0)
    if not _takes(target, count):
        yield f"made by __init__{_signature(target)}, which cannot be given {_arguments(count)}"


def _traits(kind: Kind, target: type) -> Iterator[str]:
    for trait, default in kind.traits.items():
        value = getattr(target, trait, default)
        expected = _unlike(value, default)
        if expected:
            yield f"whose {trait} is {value!r:.60}, and not {expected}"


def _unlike(value: object, default: object) -> str:
    """What a trait with this default can be, where the value is nothing like it."""
    if isinstance(default, tuple):
        is_like, expected = isinstance(value, tuple | list) and all(isinstance(one, str) for one in value), 'texts, ("like this",)'
    elif isinstance(default, bool):
        is_like, expected = isinstance(value, bool), "True or False"
    elif isinstance(default, str):
        is_like, expected = isinstance(value, str), "a text"
    else:
        is_like, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    return "" if is_like else expected


def _takes(function: Callable[..., object], count: int) -> bool:
    """Whether it can be called with so many arguments by position; what Python cannot tell of is believed."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _signature(function: Callable[..., object]) -> str:
    return str(inspect.signature(function).replace(return_annotation=inspect.Signature.empty))


def _arguments(count: int) -> str:
    return f"{count or 'no'} argument{'' if count == 1 else 's'}"


def _is_options(value: object) -> bool:
    from atoll.registry.options import Options  # Which opens pydantic: error pages and help do without.

    return isinstance(value, type) and issubclass(value, Options)
