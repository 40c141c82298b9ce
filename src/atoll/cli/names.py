"""The names that options may give, for help pages."""

from __future__ import annotations

from collections.abc import Iterator, Set

from atoll.registry.kinds import KINDS
from atoll.registry.methods import METHODS
from atoll.registry.parts import names
from atoll.registry.plugins import installed

_METHOD = {"--method", "--methods"}


def method_names() -> list[str]:
    """What --method may name."""
    return list(METHODS)


def part_names(options: Set[str]) -> Iterator[tuple[str, list[str]]]:
    """What a command with these options can be told by name, each with the names that ship and those that are installed."""
    yield from ((one, method_names()) for one in sorted(_METHOD & options))
    if "--set" in options:
        for kind in KINDS.values():
            if found := [*names(kind.name), *installed(kind.name)]:
                yield kind.key, found
    elif "--codec" in options:
        yield "--codec", [*names("codec"), *installed("codec")]
