"""A grammar: rules that name other rules in braces, expanded at random from a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

import names

Rules = Mapping[str, Sequence[str]]

_HOLE = re.compile(r"\{(\w+)(?::(\w+))?\}")
_MAKERS: Mapping[str, Callable[[random.Random], str]] = {
    "made_up": names.made_up,
    "person": names.person,
    "clock": names.clock,
    "thing": names.thing,
    "first_name": lambda rng: rng.choice(names.FIRST_NAMES),
    "noun": lambda rng: rng.choice(names.NOUNS),
    "adjective": lambda rng: rng.choice(names.ADJECTIVES),
    "day": lambda rng: rng.choice(names.DAYS),
    "month": lambda rng: rng.choice(names.MONTHS),
    "few": lambda rng: str(rng.randrange(2, 10)),
    "tens": lambda rng: str(rng.randrange(10, 60, 5)),
    "number": lambda rng: str(rng.randrange(2, 100)),
}


def expand(rules: Rules, rng: random.Random, start: str = "text") -> str:
    """One text of the grammar. `{rule}` is chosen anew at every place; `{rule:label}` is chosen once and repeated under its label."""
    chosen: dict[str, str] = {}

    def fill(hole: re.Match[str]) -> str:
        rule, label = hole.group(1), hole.group(2)
        if label is None:
            return resolve(rule)
        if label not in chosen:
            chosen[label] = resolve(rule)
        return chosen[label]

    def resolve(rule: str) -> str:
        if rule in rules:
            return _HOLE.sub(fill, rng.choice(rules[rule]))
        return _MAKERS[rule](rng)

    return resolve(start)
