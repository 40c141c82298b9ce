"""Importance of weights: the smoothing worked by hand, the mean over edges, and the file that keeps it."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import RunFolderError
from atoll.planner import importance
from atoll.planner.importance import Importance, average, by_type, per_cost, read_importance, uniform
from atoll.training import adalora
from atoll.training.adalora import smoothed, triplet_scores_R

NAMES = ("0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj")
FOUND = Importance("svd-sensitivity", {"0.q_proj": 0.25, "0.v_proj": 0.0}, {"north": 12, "south": 3})
SCORES = st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1e6), min_size=1)
EDGES = st.lists(st.tuples(st.integers(1, 1000), SCORES), min_size=1, max_size=6)


def test_the_numbers_worked_by_hand_hold() -> None:
    results = [doctest.testmod(module) for module in (importance, adalora)]
    assert (sum(one.failed for one in results), sum(one.attempted for one in results) > 5) == (0, True)


def test_tensors_are_smoothed_entry_by_entry() -> None:
    steps = np.random.default_rng(0).random((4, 3))
    state = np.zeros(3), np.zeros(3)
    for step in steps:
        state = smoothed(*state, step)
    for entry in range(3):
        alone = 0.0, 0.0
        for value in steps[:, entry]:
            alone = smoothed(*alone, float(value))
        assert (state[0][entry], state[1][entry]) == pytest.approx(alone, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20))
def test_smoothing_never_leaves_the_range_of_what_it_saw(sensitivities: list[float]) -> None:
    state = 0.0, 0.0
    for value in sensitivities:
        state = smoothed(*state, value)
    assert 0 <= state[0] <= max(sensitivities) * (1 + 1e-12)
    assert 0 <= state[1] <= max(sensitivities) * (1 + 1e-12)


def test_a_triplet_counts_its_value_and_the_means_of_its_vectors() -> None:
    random = np.random.default_rng(1)
    value, left, right = random.random(2), random.random((5, 2)), random.random((2, 3))
    plain = [value[i] + sum(left[j, i] for j in range(5)) / 5 + sum(right[i, j] for j in range(3)) / 3 for i in range(2)]
    assert triplet_scores_R(value, left, right).tolist() == pytest.approx(plain)


@settings(max_examples=40, deadline=None)
@given(EDGES, st.randoms(use_true_random=False))
def test_the_mean_over_edges_is_weighted_and_does_not_depend_on_their_order(edges: list[tuple[int, dict[str, float]]], random) -> None:  # type: ignore[no-untyped-def]
    found = average(edges)
    shuffled = list(edges)
    random.shuffle(shuffled)
    assert average(shuffled) == found
    for name, score in found.items():
        parts = [(number, scores[name]) for number, scores in edges if name in scores]
        assert score == pytest.approx(sum(n * s for n, s in parts) / sum(n for n, _ in parts))
        least, most = min(s for _, s in parts), max(s for _, s in parts)
        assert least * (1 - 1e-9) <= score <= most * (1 + 1e-9)
    assert set(found) == {name for _, scores in edges for name in scores}


@settings(max_examples=20, deadline=None)
@given(SCORES, st.integers(1, 5))
def test_edges_that_agree_are_their_own_mean(scores: dict[str, float], count: int) -> None:
    assert average([(8, scores)] * count) == pytest.approx(scores)


def test_no_edge_gives_no_score() -> None:
    assert average([]) == {}


@settings(max_examples=20, deadline=None)
@given(SCORES)
def test_types_share_their_mean_once_and_for_all(scores: dict[str, float]) -> None:
    shared = by_type(scores)
    assert list(shared) == list(scores)
    assert by_type(shared) == pytest.approx(shared)
    assert math.fsum(shared.values()) == pytest.approx(math.fsum(scores.values()))


def test_a_cost_divides_and_all_alike_are_alike() -> None:
    assert per_cost({"a": 6.0, "b": 3.0}, {"a": 2, "b": 6}) == {"a": 3.0, "b": 0.5}
    assert set(uniform(NAMES).values()) == {1.0}
    assert tuple(uniform(NAMES)) == NAMES


def test_the_file_gives_back_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "importance.json"
    path.write_text(json.dumps(FOUND.to_json()), encoding="utf-8")
    assert read_importance(path) == FOUND


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{torn", "Expecting property name"),
        ("[]", "not an object with kind, scores and edges"),
        ('{"kind": "svd-sensitivity", "scores": {"a": 1}}', "not an object with kind, scores and edges"),
        ('{"kind": 5, "scores": {"a": 1}, "edges": {}}', "kind is 5"),
        ('{"kind": "none", "scores": {}, "edges": {}}', "there is no score"),
        ('{"kind": "none", "scores": [1], "edges": {}}', "scores or edges is no object"),
        ('{"kind": "none", "scores": {"a": -1}, "edges": {}}', "the score of a is -1"),
        ('{"kind": "none", "scores": {"a": NaN}, "edges": {}}', "the score of a is nan"),
        ('{"kind": "none", "scores": {"a": 1e999}, "edges": {}}', "the score of a is inf"),
        ('{"kind": "none", "scores": {"a": null}, "edges": {}}', "the score of a is None"),
        ('{"kind": "none", "scores": {"a": true}, "edges": {}}', "the score of a is True"),
        ('{"kind": "none", "scores": {"a": 1}, "edges": {"north": 0}}', "edge north has 0 examples"),
        ('{"kind": "none", "scores": {"a": 1}, "edges": {"north": "many"}}', "edge north has 'many' examples"),
    ],
)
def test_a_damaged_file_is_one_page(tmp_path: Path, text: str, got: str) -> None:
    path = tmp_path / "importance.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError) as caught:
        read_importance(path)
    assert caught.value.where == str(path)
    assert got in caught.value.got
    assert caught.value.do


def test_a_missing_file_and_one_that_is_no_text_are_pages_too(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be read") as caught:
        read_importance(tmp_path / "importance.json")
    assert caught.value.got == "No such file or directory"
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_importance(tmp_path / "bytes.json")


def test_modules_of_another_base_are_missed_by_name() -> None:
    assert FOUND.of(["0.v_proj"]) == {"0.v_proj": 0.0}
    with pytest.raises(RunFolderError) as caught:
        FOUND.of(NAMES, "importance.json")
    assert caught.value.got == "no score for 2, such as 1.q_proj"
