"""Words said twice: the exercise from which a small model learns to copy what it has never seen."""

from __future__ import annotations

import random

import names

NOTATIONS = ("{}", "[{}]", "[{}]", "[{}]", "({})", "<{}>", '"{}"', "= {}", "/{}/", "{}:")


WORDS = (*names.NOUNS, *names.ADJECTIVES, *names.DAYS, *names.MONTHS, *names.FIRST_NAMES)


def _words(rng: random.Random) -> list[str]:
    if rng.random() < 0.3:
        return rng.sample(WORDS, rng.randint(6, 20))
    return [names.value(rng) for _ in range(rng.randint(2, 7))]


def _written(rng: random.Random, words: list[str]) -> str:
    notation, gap = rng.choice(NOTATIONS), rng.choice((" ", ", ", "; "))
    return gap.join(notation.format(word) for word in words)


def echo(rng: random.Random) -> str:
    """A list in one notation and again in another, in order or shuffled."""
    words = _words(rng)
    again = words if rng.random() < 0.7 else rng.sample(words, len(words))
    return f"{_written(rng, words)} {rng.choice(('again:', 'that is', '...', 'repeat:', 'once more:'))} {_written(rng, again)}."
