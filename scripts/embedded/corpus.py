"""The base's training text: documents of every domain, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import grammar
from echoes import echo
from prose import PROSE
from records import record

RECORDS, ECHOES = "records", "echoes"
DOMAINS = (*PROSE, RECORDS, ECHOES)
SHARES = {RECORDS: 0.35, ECHOES: 0.25}
"""Of the documents; the rest is prose, every domain alike."""
ECHOES_FIRST = 0.8
"""Share of echoes in the text that a model reads first: copying is found soon there, and used everywhere afterwards."""


def document(domain: str, rng: random.Random) -> str:
    """One document of a domain."""
    if domain in SHARES:
        return {RECORDS: record, ECHOES: echo}[domain](rng)
    return grammar.expand(PROSE[domain], rng)


def documents(seed: int, echoes: float = SHARES[ECHOES]) -> Iterator[tuple[str, str]]:
    """Domain and text, without end, a given share of them echoes; equal arguments give equal text."""
    rng = random.Random(seed)
    rest = (1 - echoes) / (1 - SHARES[ECHOES])
    prose_share = (1 - sum(SHARES.values())) * rest / len(PROSE)
    weights = [*(prose_share for _ in PROSE), SHARES[RECORDS] * rest, echoes]
    while True:
        domain = rng.choices(DOMAINS, weights)[0]
        yield domain, document(domain, rng)
