"""Every row goes to exactly one edge, the same one every time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import BadRowError, BadValueError, ColumnError, InputError, PartitionError
from atoll.tasks.partition import partition
from atoll.tasks.rows import Rows

RowsOf = Callable[..., Rows]
NAMES = st.lists(st.sampled_from(["north", "south", "east", "west", "a"]), min_size=1, max_size=5, unique=True)
OWNERS = st.lists(st.sampled_from(["north", "south", "x", "y", "z", "1"]), min_size=1, max_size=60)


def rows_with(owners: list[str | None], on_bad_row: str = "error") -> Rows:
    n = len(owners)
    return Rows(("owner",), (owners,), ("set",), np.zeros(n, dtype=int), np.arange(n), 0, on_bad_row)  # type: ignore[arg-type]


@given(
    owners=OWNERS,
    names=NAMES,
    how=st.sampled_from(["iid", "by:owner", "dirichlet:0.3:owner", "dirichlet:100:owner"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_a_partition_is_a_disjoint_cover(owners: list[str], names: list[str], how: str, seed: int) -> None:
    rows = rows_with(owners)
    try:
        shares = partition(rows, how, names, seed)
    except PartitionError:
        return
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(owners)))
    assert all(len(share) for share in shares)
    assert all((np.diff(share) > 0).all() for share in shares)
    again = partition(rows, how, names, seed)
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))
    if how == "iid":
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if how == "by:owner":
        for name, share in zip(names, shares, strict=True):
            assert name not in owners or {i for i, owner in enumerate(owners) if owner == name} <= set(share.tolist())
        for owner in set(owners):
            assert sum(any(owners[i] == owner for i in share) for share in shares) == 1


def test_by_column_gives_the_rest_first_to_edges_without_rows() -> None:
    shares = partition(rows_with(["z", "north", "x", "y", "x"]), "by:owner", ["south", "north"], 0)
    assert [share.tolist() for share in shares] == [[2, 3, 4], [0, 1]]


def test_seeds_differ_and_concentration_matters() -> None:
    rows = rows_with(["x", "y"] * 200)
    assert not np.array_equal(partition(rows, "iid", ["a", "b"], 0)[0], partition(rows, "iid", ["a", "b"], 1)[0])
    owners = np.array(["x", "y"] * 200)

    def skew(how: str) -> float:
        return float(
            np.mean([abs((owners[share] == "x").mean() - 0.5) for seed in range(8) for share in partition(rows, how, ["a", "b"], seed)])
        )

    assert skew("dirichlet:1000:owner") < 0.05 < skew("dirichlet:0.5:owner")


@pytest.mark.parametrize(
    ("how", "error", "do"),
    [
        ("idd", BadValueError, "did you mean 'iid'?"),
        ("by", BadValueError, "by:owner"),
        ("by:", BadValueError, "by:owner"),
        ("iid:owner", BadValueError, "by:owner"),
        ("drichlet:1:owner", BadValueError, "did you mean 'dirichlet'?"),
        ("dirichlet:owner", BadValueError, "dirichlet:0.3"),
        ("dirichlet:x:owner", BadValueError, "dirichlet:0.3"),
        ("dirichlet:0:owner", BadValueError, "dirichlet:0.3"),
        ("dirichlet:inf:owner", BadValueError, "dirichlet:0.3"),
        ("by:onwer", ColumnError, "did you mean 'owner'?"),
        ("dirichlet:1:onwer", ColumnError, "did you mean 'owner'?"),
    ],
)
def test_bad_partitions(how: str, error: type[InputError], do: str) -> None:
    with pytest.raises(error) as caught:
        partition(rows_with(["x", "y"]), how, ["a"], 0)
    assert caught.value.where == "[data] partition"
    assert do in caught.value.do


@pytest.mark.parametrize("how", ["iid", "by:owner", "dirichlet:1:owner"])
def test_an_edge_with_nothing(how: str) -> None:
    with pytest.raises(PartitionError) as caught:
        partition(rows_with(["x", "x"]), how, ["a", "b", "c"], 0)
    assert "edge " in caught.value.where
    assert caught.value.do


def test_rows_without_a_value() -> None:
    with pytest.raises(BadRowError) as caught:
        partition(rows_with(["x", None]), "by:owner", ["a"], 0)
    assert caught.value.where == "set, row 2, column owner"
    with pytest.raises(BadRowError):
        partition(rows_with(["x", " "]), "by:owner", ["a"], 0)
    for how in ("by:owner", "dirichlet:100:owner"):
        shares = partition(rows_with(["x", None, "y", "", "y", "x"], "skip"), how, ["x", "y"], 0)
        assert sorted(np.concatenate(shares).tolist()) == [0, 2, 4, 5], "a row without a value belongs to nobody"


def test_a_value_is_an_edges_name_however_it_is_stored() -> None:
    shares = partition(rows_with(["1", " 2", 1.0, 2]), "by:owner", ["1", "2"], 0)  # type: ignore[list-item]
    assert [share.tolist() for share in shares] == [[0, 2], [1, 3]]
