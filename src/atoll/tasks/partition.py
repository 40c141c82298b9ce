"""Rows dealt to edges: evenly, by the values of a column, or unevenly by a Dirichlet draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from atoll import seeding
from atoll.errors import BadRowError, BadValueError, ColumnError, PartitionError
from atoll.tasks.forms.values import class_of
from atoll.tasks.readers.nearest import did_you_mean
from atoll.tasks.rows import RowProblem, Rows
from atoll.units import counted

SYNTAX = '"iid", "by:COLUMN" or "dirichlet:CONCENTRATION:COLUMN"'


def partition(rows: Rows, how: str, edge_names: Sequence[str], seed: int) -> tuple[np.ndarray, ...]:
    """Row numbers for each edge, in ascending order; every row goes to exactly one edge, or, without a value to go by, to none.

    "by:COLUMN" gives a value that is an edge's name to that edge, and the other values in sorted order to the edges that have none yet,
    then to all in turn. "dirichlet:C:COLUMN" draws for each value the edges' shares from a symmetric Dirichlet distribution.

    Raises: BadValueError, ColumnError, BadRowError; PartitionError where an edge is left with nothing.
    Source: Hsu, Qi and Brown 2019, arXiv:1909.06335, for Dirichlet shares.
    """
    kind, concentration, column = _parse(how, rows.columns)
    random = np.random.default_rng(seeding.stream(seed, "partition"))
    if kind == "iid":
        order = random.permutation(len(rows))
        shares = [order[edge :: len(edge_names)] for edge in range(len(edge_names))]
    elif kind == "by":
        shares = _by_value(_groups(rows, column), edge_names)
    else:
        shares = _dirichlet(_groups(rows, column), len(edge_names), concentration, random)
    for name, share in zip(edge_names, shares, strict=True):
        if not len(share):
            raise _nothing_left(rows, how, name, len(edge_names))
    return tuple(np.sort(share) for share in shares)


def _parse(how: str, columns: Sequence[str]) -> tuple[str, float, str]:
    kind, _, rest = how.partition(":")
    if how == "iid":
        return "iid", 0.0, ""
    number, has_both, column = rest.partition(":") if kind == "dirichlet" else ("1", ":", rest)
    try:
        concentration = float(number)
    except ValueError:
        concentration = math.nan
    if kind not in ("by", "dirichlet") or not column or not has_both or not (0 < concentration < math.inf):
        raise BadValueError(
            "the partition cannot be understood", where="[data] partition", got=how, expected=SYNTAX + ", with a concentration above 0",
            do=did_you_mean(kind, ("iid", "by", "dirichlet"), 'write for example "by:owner" or "dirichlet:0.3:label"')
            if kind not in ("iid", "by", "dirichlet") else 'write for example "by:owner" or "dirichlet:0.3:label"',
        )  # fmt: skip
    if column not in columns:
        listed = ", ".join(columns)
        raise ColumnError(
            "the data has no such column to partition by", where="[data] partition", got=column, expected=f"one of {listed}",
            do=did_you_mean(column, columns, f"use one of {listed}"),
        )  # fmt: skip
    return kind, concentration, column


def _groups(rows: Rows, column: str) -> dict[str, list[int]]:
    """Row numbers by the column's value, values in sorted order; rows without a value are in none where bad rows are tolerated."""
    groups: dict[str, list[int]] = {}
    for number, value in enumerate(rows.column(column)):
        try:
            groups.setdefault(class_of({column: value}, column), []).append(number)
        except RowProblem as problem:
            if rows.on_bad_row == "error":
                raise BadRowError(
                    "a row has no value to partition by", where=f"{rows.where(number)}, column {column}", got=problem.got,
                    expected="a value in every row", do='mend the row, or set on_bad_row = "skip" in [data]',
                ) from None  # fmt: skip
    return dict(sorted(groups.items()))


def _by_value(groups: dict[str, list[int]], edge_names: Sequence[str]) -> list[np.ndarray]:
    shares: list[list[int]] = [list(groups.get(name, [])) for name in edge_names]
    others = [numbers for value, numbers in groups.items() if value not in edge_names]
    empty = [edge for edge, share in enumerate(shares) if not share]
    for turn, numbers in enumerate(others):
        edge = empty[turn] if turn < len(empty) else (turn - len(empty)) % len(edge_names)
        shares[edge] += numbers
    return [np.array(share, dtype=np.int64) for share in shares]


def _dirichlet(groups: dict[str, list[int]], num_edges: int, concentration: float, random: np.random.Generator) -> list[np.ndarray]:
    shares: list[list[np.ndarray]] = [[] for _ in range(num_edges)]
    for numbers in groups.values():
        parts = random.dirichlet(np.full(num_edges, concentration))
        # A tiny concentration can underflow to no parts at all: then one edge gets everything, which is its limit.
        parts = parts if np.isfinite(parts).all() else np.eye(num_edges)[random.integers(num_edges)]
        borders = np.rint(np.cumsum(parts)[:-1] * len(numbers)).astype(int)
        for share, piece in zip(shares, np.split(random.permutation(numbers), borders), strict=True):
            share.append(piece)
    return [np.concatenate([np.zeros(0), *share]).astype(np.int64) for share in shares]


def _nothing_left(rows: Rows, how: str, name: str, num_edges: int) -> PartitionError:
    advice = {"iid": "use fewer edges or more rows", "by": "use fewer edges, or name the edges after values of the column"}
    return PartitionError(
        "an edge is left without rows", where=f"[data] partition = {how!r}, edge {name}",
        got=f"{counted(len(rows), 'row')} for {counted(num_edges, 'edge')}",
        expected="at least one row for every edge",
        do=advice.get(how.partition(":")[0], "use a larger concentration, fewer edges or another seed"),
    )  # fmt: skip
