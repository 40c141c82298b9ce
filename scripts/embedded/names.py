"""Made-up names and everyday values, so that a model has to copy what it cannot know by heart."""

from __future__ import annotations

import random


def words(text: str, between: str = " ") -> tuple[str, ...]:
    """The words of a list written as people write one."""
    return tuple(text.split(between))


ONSETS = words("b br c ch cl d dr f fl g gl gr h j k l m n p pl pr qu r s sh sl st t th tr v w y z")
VOWELS = words("a e i o u ai ea ee oa oo ou")
CODAS = ("", "", "", "l", "ll", "m", "n", "nd", "nt", "r", "rk", "rn", "s", "sk", "st", "t", "x", "ck", "th")
ENDINGS = ("a", "o", "en", "er", "ick", "ley", "ton", "wood", "by", "is", "ette", "ine", "ow", "ian")
FIRST_NAMES = words(
    "Anna Ben Clara David Ella Frank Grace Henry Ida Jack Kate Leo Mary Noah Olive Paul Rosa Sam Tom Vera Will Nora Max Lucy Peter Jane"
)
ADJECTIVES = words(
    "red blue green small large old new warm cold quiet bright dark soft sweet round wooden fresh plain rich light heavy early late"
)
NOUNS = words(
    "river bridge garden market window table lamp basket coat bread soup apple tree road hill train boat letter book clock chair bottle "
    "blanket candle mirror hat shoe spoon flower stone field barn tower gate wheel bell drum kite rope ladder bucket "
    "doctor patient animal medicine sample result keeper room floor tablet drop bench list morning water food head hand"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")


def made_up(rng: random.Random) -> str:
    """One capitalised word that no dictionary has."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 1, 2)))]
    ending = rng.choice(ENDINGS) if len(syllables) == 1 or rng.random() < 0.5 else ""
    return ("".join(syllables) + ending).capitalize()


def person(rng: random.Random) -> str:
    """A person: a first name everybody has, a made-up one, or both."""
    return rng.choice((rng.choice(FIRST_NAMES), made_up(rng), f"{rng.choice(FIRST_NAMES)} {made_up(rng)}"))


def clock(rng: random.Random) -> str:
    """A time of day."""
    return f"{rng.randrange(6, 22)}:{rng.randrange(0, 60, 5):02d}"


def thing(rng: random.Random) -> str:
    """An adjective and a noun."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def value(rng: random.Random) -> str:
    """Any value that a record may hold: what must be copied is seldom the same twice."""
    kind = rng.randrange(10)
    if kind < 3:
        return made_up(rng)
    if kind < 5:
        return made_up(rng).lower()
    if kind < 6:
        return f"{made_up(rng)} {rng.choice(NOUNS).capitalize()}"
    if kind < 7:
        return thing(rng)
    if kind < 8:
        return str(rng.randrange(2, 1000))
    return rng.choice((clock, person, lambda r: r.choice(DAYS)))(rng)
