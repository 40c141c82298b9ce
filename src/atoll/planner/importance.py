"""How much each weight of the base contributes to training: smoothed sensitivities of its warm-up adapter in, one score a weight out.

Shape suffixes: O outputs and I inputs of the module, R rank of its warm-up adapter P diag(l) Q.

Source: AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512), eqs. 7 to 11, for the entries and triplets; a weight's score is the sum over
its triplets.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

from atoll.errors import RunFolderError

ImportanceKind = Literal["svd-sensitivity", "gradient-weight", "none"]

KEEP_IMPORTANCE = 0.85
"""b1: the share of the smoothed sensitivity that a step leaves as it was."""
KEEP_UNCERTAINTY = 0.85
"""b2: the same share of the uncertainty."""


class Arithmetic(Protocol):
    """What a sensitivity may be: a number, or a tensor of them."""

    def __add__(self, other: Any, /) -> Self:
        """Sum."""

    def __sub__(self, other: Any, /) -> Self:
        """Difference."""

    def __mul__(self, other: Any, /) -> Self:
        """Product."""

    def __abs__(self) -> Self:
        """Magnitude."""


A = TypeVar("A", bound=Arithmetic)


def smoothed(importance: A, uncertainty: A, sensitivity: A) -> tuple[A, A]:
    """I' and U' after a step in which the entry's sensitivity |w dL/dw| was s; both start at zero, and I' U' is the entry's score.

    I' = b1 I + (1 - b1) s, and U' = b2 U + (1 - b2) |s - I'|. Three steps with sensitivities 2, 2 and 0, by hand:
    I = 0.3, 0.555, 0.47175 and U = 0.255, 0.4335, 0.4392375.

    >>> state = (0.0, 0.0)
    >>> for s in (2.0, 2.0, 0.0):
    ...     state = smoothed(*state, s)
    ...     print(f"{state[0]:.5f} {state[1]:.7f} {state[0] * state[1]:.7f}")
    0.30000 0.2550000 0.0765000
    0.55500 0.4335000 0.2405925
    0.47175 0.4392375 0.2072103
    """
    importance = importance * KEEP_IMPORTANCE + sensitivity * (1 - KEEP_IMPORTANCE)
    uncertainty = uncertainty * KEEP_UNCERTAINTY + abs(sensitivity - importance) * (1 - KEEP_UNCERTAINTY)
    return importance, uncertainty


def triplet_scores_R(value_R: Any, left_OR: Any, right_RI: Any) -> Any:
    """S(l_i) + mean over j of S(P_ji) + mean over j of S(Q_ij) for every triplet i, from the scores of all entries (numpy or torch).

    >>> import numpy as np
    >>> left, right = np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[6.0, 0.0, 3.0], [0.0, 0.0, 9.0]])
    >>> triplet_scores_R(np.array([10.0, 20.0]), left, right).tolist()
    [15.0, 25.0]
    """
    return value_R + left_OR.mean(0) + right_RI.mean(1)


def average(scores_by_edge: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The mean over the edges, each weighted by its number of examples |D_i|; a module counts where it was scored.

    The order of the edges changes no bit of the result; modules come in that of the first edge that scored them.

    >>> average([(3, {"a": 1.0, "b": 2.0}), (1, {"a": 5.0, "c": 7.0})])
    {'a': 2.0, 'b': 2.0, 'c': 7.0}
    """
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for num_examples, scores in scores_by_edge:
        for name, score in scores.items():
            found[name].append((num_examples, score))
    return {name: math.fsum(n * score for n, score in parts) / sum(n for n, _ in parts) for name, parts in found.items()}


def by_type(scores: Mapping[str, float]) -> dict[str, float]:
    """Every module with the mean score of its type, which is the last part of its name.

    >>> by_type({"0.q_proj": 1.0, "0.v_proj": 8.0, "1.q_proj": 3.0})
    {'0.q_proj': 2.0, '0.v_proj': 8.0, '1.q_proj': 2.0}
    """
    types: dict[str, list[float]] = defaultdict(list)
    for name, score in scores.items():
        types[_type_of(name)].append(score)
    means = {kind: math.fsum(values) / len(values) for kind, values in types.items()}
    return {name: means[_type_of(name)] for name in scores}


def per_cost(scores: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    """Each score over the cost of training its module, such as the FLOPs of its adapter; every cost is above zero.

    >>> per_cost({"a": 6.0, "b": 6.0}, {"a": 2, "b": 3, "c": 1})
    {'a': 3.0, 'b': 2.0}
    """
    return {name: score / costs[name] for name, score in scores.items()}


def uniform(names: Iterable[str]) -> dict[str, float]:
    """Every module as important as any other."""
    return dict.fromkeys(names, 1.0)


@dataclass(frozen=True, slots=True)
class Importance:
    """What a warm-up found, as importance.json keeps it."""

    kind: ImportanceKind
    scores: Mapping[str, float]
    """By full module name; finite, and not below zero."""
    edges: Mapping[str, int]
    """Who scored, and on how many examples."""

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {"kind": self.kind, "scores": dict(self.scores), "edges": dict(self.edges)}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """What `to_json` gave.

        Raises: ValueError, in words for the user, for anything else.
        """
        if not isinstance(value, dict) or value.keys() != {"kind", "scores", "edges"}:
            raise ValueError("not an object with kind, scores and edges")
        kind, scores, edges = value["kind"], value["scores"], value["edges"]
        if kind not in ("svd-sensitivity", "gradient-weight", "none"):
            raise ValueError(f"kind is {kind!r}")
        if not isinstance(scores, dict) or not scores or not isinstance(edges, dict):
            raise ValueError("scores or edges is no object, or there is no score")
        for name, score in scores.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score < math.inf:
                raise ValueError(f"the score of {name} is {score!r}")
        for edge, number in edges.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"edge {edge} has {number!r} examples")
        return cls(kind, {name: float(score) for name, score in scores.items()}, edges)

    def of(self, names: Sequence[str], where: str = "") -> dict[str, float]:
        """The scores of these modules, in their order.

        Raises: RunFolderError where one has none; `where` is what the scores came from.
        """
        missing = [name for name in names if name not in self.scores]
        if missing:
            raise RunFolderError(
                "the importance of some modules is not known", where=where, got=f"no score for {len(missing)}, such as {missing[0]}",
                expected=f"scores of the {len(names)} modules of this run", do="use the file of a run with the same base and targets",
            )  # fmt: skip
        return {name: self.scores[name] for name in names}


def read_importance(path: Path) -> Importance:
    """The importance.json of an earlier run.

    Raises: RunFolderError for a file that is missing or damaged.
    """
    expected, do = "importance.json as a run wrote it", "give the importance.json of a run whose plan was made by importance"
    try:
        return Importance.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        got = error.strerror or str(error)
    except ValueError as error:
        got = str(error)
    raise RunFolderError("the importance of weights cannot be read", where=str(path), got=got, expected=expected, do=do)


def _type_of(name: str) -> str:
    return name.rpartition(".")[2]
