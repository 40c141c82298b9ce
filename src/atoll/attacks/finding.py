"""What an attack found, in figures: tokens recovered, the rare ones apart, the order of words, and how sure that is.

Shape suffixes: T positions of a row, K guesses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Name = Literal["nearest-embedding", "inverter", "optimisation", "labels", "update-inversion", "membership", "wire-adapters"]
NAMES: tuple[Name, ...] = ("nearest-embedding", "inverter", "optimisation", "labels", "update-inversion", "membership", "wire-adapters")
GUESSES = 5
_COMMON_WORDS = 500
_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """One attack; shares are from 0 to 1, and None where they do not apply. `interval` is that of the first figure, at 95 %, over rows."""

    name: Name
    tokens_recovered: float | None = None
    top5_recovered: float | None = None
    rare_recovered: float | None = None
    rouge_l: float | None = None
    interval: tuple[float, float] | None = None
    seconds: float = 0.0
    example: Mapping[str, str] | None = None
    common_recovered: float | None = None
    rows: int = 0
    chance: float | None = None
    """What comes out of the first figure without looking."""
    why: str = ""
    """Why it does not apply, or what was counted."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Of this attack alone."""

    def to_json(self, *, example: bool = True) -> dict[str, object]:
        """As `atoll audit --json` has it."""
        return {
            "name": self.name, "tokens_recovered": self.tokens_recovered, "top5_recovered": self.top5_recovered,
            "rare_recovered": self.rare_recovered, "common_recovered": self.common_recovered, "rouge_l": self.rouge_l,
            "interval": None if self.interval is None else list(self.interval), "chance": self.chance, "rows": self.rows,
            "seconds": round(self.seconds, 3), "why": self.why, **self.figures,
            "example": dict(self.example) if self.example is not None and example else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Guessed:
    """One row's true tokens and the guesses for each, the best first. Shapes: true_T, best_TK."""

    true_T: Tensor
    best_TK: Tensor


class Words:
    """Which tokens are of rare words: those with a digit, and those that are not among the commonest of public text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, public: Sequence[Tensor]) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        counts = Counter(word.lower() for row in public for word in re.findall(r"\w+", str(tokenizer.decode(row.tolist()))))
        self.common = frozenset(word for word, _ in counts.most_common(_COMMON_WORDS))

    def text(self, ids_T: Tensor) -> str:
        """Without special tokens."""
        return str(self.tokenizer.decode(ids_T.tolist(), skip_special_tokens=True)).strip()

    def counted(self, ids_T: Tensor) -> np.ndarray:
        """Which tokens are no special ones: those are known to everybody."""
        return np.array([token not in self.special for token in ids_T.tolist()], dtype=bool)

    def rare(self, ids_T: Tensor) -> np.ndarray:
        """Which tokens lie in a rare word.

        A word is what stands between spaces and signs in the decoded text, so that it is found in every tokenizer's pieces.
        """
        pieces = [str(self.tokenizer.decode([token])) for token in ids_T.tolist()]
        starts = [_begins_word(mark) for mark in self.tokenizer.convert_ids_to_tokens(ids_T.tolist())]
        rare, begin = np.zeros(len(pieces), dtype=bool), 0
        for end in range(1, len(pieces) + 1):
            if end < len(pieces) and not starts[end]:
                continue
            words = re.findall(r"\w+", "".join(pieces[begin:end]).lower())
            rare[begin:end] = any(any(sign.isdigit() for sign in word) or word not in self.common for word in words)
            begin = end
        return rare & self.counted(ids_T)


def _begins_word(mark: str) -> bool:
    return mark[:1] in ("\u2581", "\u0120", "\u010a", " ") or not (mark[:1].isalnum() or mark.startswith("##"))


def interval_of(parts: np.ndarray, wholes: np.ndarray, seed: int) -> tuple[float, float]:
    """A 95 % interval of sum(parts) / sum(wholes), by drawing rows anew (percentile bootstrap)."""
    chosen = np.random.default_rng(seed).integers(0, len(parts), (_DRAWS, len(parts)))
    shares = parts[chosen].sum(1) / np.maximum(wholes[chosen].sum(1), 1)
    return float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975))


def finding_of(name: Name, rows: Sequence[Guessed], words: Words, *, seed: int, seconds: float, why: str = "") -> Finding:
    """The figures of an attack that guesses each position of each row."""
    hits, top5, counted, rare_hits, rare = (np.zeros(len(rows)) for _ in range(5))
    for place, row in enumerate(rows):
        is_hit = (row.best_TK[:, 0] == row.true_T).numpy()
        counts, is_rare = words.counted(row.true_T), words.rare(row.true_T)
        hits[place], counted[place] = (is_hit & counts).sum(), counts.sum()
        top5[place] = ((row.best_TK == row.true_T[:, None]).any(1).numpy() & counts).sum()
        rare_hits[place], rare[place] = (is_hit & is_rare).sum(), is_rare.sum()
    constant = Counter(token for row in rows for token in row.true_T.tolist() if token not in words.special).most_common(1)
    texts = [(words.text(row.true_T), words.text(row.best_TK[:, 0])) for row in rows]
    total, common = max(counted.sum(), 1), counted.sum() - rare.sum()
    return Finding(
        name, tokens_recovered=float(hits.sum() / total), top5_recovered=float(top5.sum() / total),
        rare_recovered=float(rare_hits.sum() / rare.sum()) if rare.sum() else None, rouge_l=_rouge_l(texts),
        interval=interval_of(hits, counted, seed), seconds=seconds, example={"true": texts[0][0], "recovered": texts[0][1]},
        common_recovered=float((hits.sum() - rare_hits.sum()) / common) if common else None, rows=len(rows), why=why,
        chance=float(constant[0][1] / total) if constant else None,
    )  # fmt: skip


def _rouge_l(texts: Sequence[tuple[str, str]]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return float(np.mean([scorer.score(true, found)["rougeL"].fmeasure for true, found in texts]))
