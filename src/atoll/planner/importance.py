"""How much each weight of the base contributes to training, as a value: averaged over edges, kept in a file, read again."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from atoll.errors import RunFolderError


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

    kind: str
    """How it was found: the name of an importance score, or "none"."""
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
        if not isinstance(kind, str) or not kind:
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
