"""Data to text for the base: records of many made-up things, and the sentence that says them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import names

KINDS = names.words("house shop horse song garden ship hotel game poem school farm road engine picture club")
KEYS = names.words(
    "colour size price place owner maker age weight length street town material taste shape season number speed sound smell pattern "
    "height floor country language friend start end road label key code rank team prize "
    "doctor patient animal medicine sample result keeper room"
)


def _clause(rng: random.Random, key: str, value: str) -> str:
    said = (f"the {key} is {value}", f"its {key} is {value}", f"{value} is the {key}", f"it has {value} as {key}", f"{value} as its {key}")
    return rng.choice(said)


def _all_said(rng: random.Random, kind: str, name: str, slots: Sequence[tuple[str, str]]) -> str:
    clauses = [_clause(rng, key, value) for key, value in slots]
    opening = rng.choice((f"{name} is a {kind}", f"The {kind} is called {name}", f"This {kind} is {name}", f"Here is {name}, a {kind}"))
    return f"{opening}; {', '.join(clauses[:-1])} and {clauses[-1]}." if len(clauses) > 1 else f"{opening}; {clauses[0]}."


def _listed(rng: random.Random, kind: str, name: str, slots: Sequence[tuple[str, str]]) -> str:
    values = ", ".join(value for _, value in slots)
    return rng.choice((f"{name}, {kind}: {values}.", f"A {kind} with {values}: that is {name}.", f"{values} ({kind} {name})."))


def _one_said(rng: random.Random, kind: str, name: str, slots: Sequence[tuple[str, str]]) -> str:
    key, value = rng.choice(slots)
    said = (f"The {key} of {name} is {value}.", f"{value} is the {key} of the {kind} {name}.", f"A {kind} whose {key} is {value}.")
    return rng.choice(said)


def record(rng: random.Random) -> str:
    """One record and its sentence, in the base's own notation: `kind = name; key = value => sentence`."""
    kind, name = rng.choice(KINDS), names.made_up(rng)
    keys = rng.sample(KEYS, rng.randrange(2, 6))
    slots = [(key, names.value(rng)) for key in keys]
    text = rng.choice((_all_said, _all_said, _listed, _one_said))(rng, kind, name, rng.sample(slots, len(slots)))
    return f"{kind} = {name}; {'; '.join(f'{key} = {value}' for key, value in slots)} => {text}"
