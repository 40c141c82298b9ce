"""Which modules stay active: every policy and threshold, and the laws that all choices obey."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.config.schema import RunConfig, Select, Wire
from atoll.cost.split_traffic import groups
from atoll.errors import ConflictError, UpdateRefusedError
from atoll.selection.pool import PoolModule, pool_of
from atoll.selection.selector import ModuleSelector, StepTokens, schedule_of, schedule_warning, selector_of
from atoll.shapes import BaseShapes, ModuleShape

# Not in execution order, as some models list them.
PARTS = (("self_attn.o_proj", 8, 8, "attention"), ("self_attn.q_proj", 8, 8, "attention"), ("self_attn.k_proj", 8, 4, "attention"),
         ("mlp.down_proj", 16, 8, "mlp"), ("mlp.up_proj", 8, 16, "mlp"))  # fmt: skip
NUM_BLOCKS = 4
MODULES = tuple(
    ModuleShape(f"layers.{block}.{name}", d_in, d_out, kind, block)  # type: ignore[arg-type]
    for block in range(NUM_BLOCKS)
    for name, d_in, d_out, kind in PARTS
)
SHAPES = BaseShapes("llama", 10**6, MODULES, 8, 100, NUM_BLOCKS, None, True, 2.0, 2, 8, False)
RANKS = {module.name: 2 for module in MODULES}
TOKENS = StepTokens(num_tokens=20, num_label_tokens=5)
SCORED = ("kill-and-revive", "early-kill", "magnitude", "snip")


def _selector(
    policy: str = "kill-and-revive", names: tuple[str, ...] = ("a", "b", "c", "d"), seed: int = 0, **more: object
) -> ModuleSelector:
    """Over modules of one size, one at each place, all in the host."""
    select = Select.model_validate({"policy": policy, "observe_steps": 2, "every": 20, **more})
    pool = tuple(PoolModule(name, (number, 0), (8, 8, 2), remote=True) for number, name in enumerate(names))
    return ModuleSelector(select, pool, schedule_of(select, 100), seed, 8, Wire(), keeps_back=False)


def _choose(scores: list[float], **settings: object) -> str:
    names = tuple("abcdefghijklmnopqrstuvwxyz"[: len(scores)])
    return "".join(_selector(names=names, **settings).choose(dict(zip(names, scores, strict=True)), TOKENS, 2))  # type: ignore[arg-type]


def test_the_pool_is_in_execution_order_and_knows_where_each_module_runs() -> None:
    config = RunConfig.model_validate({"model": {"cut": {"front": 1, "back": 1}}})
    pool = pool_of(config, SHAPES, {**RANKS, "layers.2.mlp.up_proj": 0})
    assert [module.name for module in pool[:5]] == [
        "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.o_proj", "layers.0.mlp.up_proj",
        "layers.0.mlp.down_proj",
    ]  # fmt: skip
    assert [module.place for module in pool[:5]] == [(0, 0), (0, 0), (0, 1), (0, 2), (0, 3)]
    assert (pool[1].size, len(pool)) == ((8, 4, 2), 19)
    assert Counter((module.front, module.remote) for module in pool) == {(True, False): 5, (False, True): 9, (False, False): 5}
    remote = [module.size for module in pool if module.remote]
    assert remote == [size for group in groups(config, SHAPES, {**RANKS, "layers.2.mlp.up_proj": 0}) for size in group]


@pytest.mark.parametrize(
    ("policy", "kind"),
    [("all", None), ("kill-and-revive", "gradient"), ("early-kill", "gradient"), ("random", None), ("magnitude", "magnitude"),
     ("snip", "saliency"), ("last-layers", None)],
)  # fmt: skip
def test_every_policy_says_what_it_needs_to_know(policy: str, kind: str | None) -> None:
    assert _selector(policy).score_kind == kind


@pytest.mark.parametrize("variation", ["change", "norm-change", "product-change", "gradient"])
def test_the_variation_is_a_setting_of_two_policies(variation: str) -> None:
    found = {policy: _selector(policy, variation=variation).score_kind for policy in (*SCORED, "random")}
    assert found == {"kill-and-revive": variation, "early-kill": variation, "magnitude": "magnitude", "snip": "saliency", "random": None}


@pytest.mark.parametrize(
    ("settings", "scores", "kept"),
    [
        ({}, [1, 9, 5, 2], "b"),  # an eighth of four, and at least one
        ({"keep": 0.5}, [1, 9, 5, 2], "bc"),
        ({"keep": 0.74}, [1, 9, 5, 2], "bc"),
        ({"keep": 1.0}, [1, 9, 5, 2], "abcd"),
        ({"keep": 0.5}, [7, 7, 7, 7], "ab"),
        ({"threshold": "mean"}, [1, 9, 5, 2], "bc"),  # mean 4.25
        ({"threshold": "mean", "mean_factor": 0.4}, [1, 9, 5, 2], "bcd"),
        ({"threshold": "mean", "mean_factor": 3.0}, [1, 9, 5, 2], "b"),
        ({"threshold": "mean"}, [0.1, 0.1, 0.1], "a"),
        ({"threshold": "mean", "mean_factor": 0.1}, [0, 0, 0], "a"),
        ({"threshold": "absolute", "least_variation": 2.0}, [1, 9, 5, 2], "bc"),
        ({"threshold": "absolute", "least_variation": 1.9}, [1, 9, 5, 2], "bcd"),
        ({"threshold": "absolute", "least_variation": 50.0}, [1, 9, 5, 2], "b"),
        # In units of 20 * 8 numbers: h 1, hidden and g 0.25 each; a module x 1, two of 1, and dx 1 above the lowest: 16.5 in all.
        ({"threshold": "budget", "budget": 1.0}, [1, 9, 5, 2], "abcd"),
        ({"threshold": "budget", "budget": 0.52}, [1, 9, 5, 8], "bd"),
        ({"threshold": "budget", "budget": 0.51}, [1, 9, 5, 8], "b"),
        ({"threshold": "budget", "budget": 0.01}, [1, 9, 5, 2], "b"),
        ({"policy": "early-kill", "keep": 0.5}, [1, 9, 5, 2], "bc"),
        ({"policy": "magnitude", "keep": 0.5}, [1, 9, 5, 2], "bc"),
        ({"policy": "snip", "keep": 0.5}, [1, 9, 5, 2], "bc"),
        ({"policy": "snip", "threshold": "mean"}, [1, 9, 5, 2], "bc"),
        ({"policy": "last-layers", "keep": 0.5}, [9, 9, 5, 2], "cd"),
        ({"policy": "last-layers"}, [9, 9, 5, 2], "d"),
        ({"policy": "all"}, [1, 9, 5, 2], "abcd"),
    ],
)
def test_every_threshold_and_policy_by_hand(settings: dict[str, object], scores: list[float], kept: str) -> None:
    assert _choose(scores, **settings) == kept


def test_what_moves_most_may_cost_too_much() -> None:
    """Two cheap modules of one place score more together than the one that moved most and costs as much as both."""
    select = Select(policy="kill-and-revive", threshold="budget", budget=0.6)
    sizes = {"wide": (0, 160), "left": (1, 8), "right": (1, 8)}
    pool = tuple(PoolModule(name, (place, 0), (8, d_out, 2), remote=True) for name, (place, d_out) in sizes.items())
    selector = ModuleSelector(select, pool, schedule_of(select, 100), 0, 8, Wire(), keeps_back=False)
    scores = {"wide": 3.0, "left": 2.0, "right": 2.0}
    assert selector.choose(scores, TOKENS, 2) == ("left", "right")
    assert replace(selector, select=select.model_copy(update={"threshold": "keep"})).choose(scores, TOKENS, 2) == ("wide",)
    # One product of rank 2 for each token instead of 160 numbers: now it is the x that counts, and all but one share theirs.
    factored = replace(selector, wire_mode="factored")
    assert factored.choose({**scores, "wide": 4.5}, StepTokens(10_000, 10), 2) == ("wide",)




SCORES = st.lists(st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e30)), min_size=1, max_size=26)


@settings(max_examples=100, deadline=None)
@given(
    SCORES,
    st.sampled_from((*SCORED, "random", "last-layers")),
    st.sampled_from(("keep", "mean", "budget")),
    st.floats(0.01, 1.0),
    st.randoms(),
)
def test_a_choice_is_part_of_the_pool_in_its_order_whatever_order_scores_come_in(
    scores: list[float], policy: str, threshold: str, keep: float, shuffler: random.Random
) -> None:
    names = tuple("abcdefghijklmnopqrstuvwxyz"[: len(scores)])
    selector = _selector(policy, names, threshold=threshold, keep=keep)
    pairs = list(zip(names, scores, strict=True))
    chosen = selector.choose(dict(pairs), TOKENS, 2)
    assert chosen
    assert [name for name in names if name in chosen] == list(chosen)
    shuffler.shuffle(pairs)
    assert selector.choose(dict(pairs), TOKENS, 2) == chosen


@given(SCORES, st.sampled_from((*SCORED, "random", "last-layers")), st.integers(1, 100))
def test_as_many_are_kept_as_the_share_says(scores: list[float], policy: str, percent: int) -> None:
    names = tuple("abcdefghijklmnopqrstuvwxyz"[: len(scores)])
    chosen = _selector(policy, names, keep=percent / 100).choose(dict(zip(names, scores, strict=True)), TOKENS, 2)
    assert len(chosen) == max(1, percent * len(names) // 100)
    if policy in SCORED:
        by_name = dict(zip(names, scores, strict=True))
        assert min(by_name[name] for name in chosen) >= max((by_name[name] for name in names if name not in chosen), default=0.0)


def test_a_share_means_what_is_written() -> None:
    """0.29 times 100 is 28.999999999999996 in binary fractions."""
    names = tuple(f"m{number}" for number in range(100))
    assert len(_selector("last-layers", names, keep=0.29).choose({}, TOKENS, 2)) == 29


@given(SCORES, st.sampled_from((0.3, 1.0, 1.7)))
def test_above_the_mean_is_exact(scores: list[float], factor: float) -> None:
    names = "abcdefghijklmnopqrstuvwxyz"[: len(scores)]
    mean = sum(map(Fraction, scores)) / len(scores) * Fraction(str(factor))
    above = "".join(name for name, score in zip(names, scores, strict=True) if Fraction(score) > mean)
    assert _choose(scores, threshold="mean", mean_factor=factor) == (above or names[scores.index(max(scores))])


def test_random_choices_follow_from_seed_and_names_and_are_spread() -> None:
    names = tuple("abcdefgh")
    counts: Counter[str] = Counter()
    for seed in range(400):
        selector = _selector("random", names, seed=seed, keep=0.25)
        chosen = selector.choose({}, TOKENS, 2)
        assert chosen == selector.choose(dict.fromkeys(names, 1.0), TOKENS, 2)
        assert len(chosen) == 2
        counts.update(chosen)
    assert all(60 < counts[name] < 140 for name in names), counts  # 100 each, standard deviation 8.7


def _drawn_one_by_one(names: list[str], scores: list[float], count: int) -> dict[frozenset[str], float]:
    """The chance of each set of so many, by adding up every order in which it may be drawn."""
    found: dict[frozenset[str], float] = {}
    for order in permutations(range(len(names)), count):
        chance, left = 1.0, sum(scores)
        for number in order:
            chance, left = chance * scores[number] / left, left - scores[number]
        drawn = frozenset(names[number] for number in order)
        found[drawn] = found.get(drawn, 0.0) + chance
    return found


def test_lots_fall_as_if_modules_were_drawn_one_by_one_in_proportion_to_their_scores() -> None:
    names, scores = list("abcd"), [1.0, 2.0, 3.0, 6.0]
    selector, counts = _selector(names=tuple(names), keep=0.5, draw="lottery"), Counter[frozenset[str]]()
    for steps_done in range(4000):
        counts[frozenset(selector.choose(dict(zip(names, scores, strict=True)), TOKENS, steps_done))] += 1
    wanted = _drawn_one_by_one(names, scores, 2)
    assert wanted.keys() == counts.keys()
    for drawn, chance in wanted.items():  # within four standard deviations
        assert abs(counts[drawn] - 4000 * chance) < 4 * math.sqrt(4000 * chance * (1 - chance)), (drawn, counts[drawn], chance)


@given(SCORES, st.integers(1, 100), st.integers(0, 10**6), st.integers(-60, 60))
def test_a_lottery_keeps_the_share_repeats_itself_and_knows_no_unit(scores: list[float], percent: int, steps: int, exponent: int) -> None:
    names = tuple("abcdefghijklmnopqrstuvwxyz"[: len(scores)])
    selector = _selector(names=names, keep=percent / 100, draw="lottery")
    chosen = selector.choose(dict(zip(names, scores, strict=True)), TOKENS, steps)
    assert len(chosen) == max(1, percent * len(names) // 100)
    assert [name for name in names if name in chosen] == list(chosen)
    assert chosen == selector.choose(dict(reversed(list(zip(names, scores, strict=True)))), TOKENS, steps)
    scaled = [math.ldexp(score, exponent) for score in scores]
    if all(score == 0 or score > 1e-200 for score in scores):  # else rounding, or no number at all
        assert chosen == selector.choose(dict(zip(names, scaled, strict=True)), TOKENS, steps)
    zeros = {name for name, score in zip(names, scores, strict=True) if score == 0}
    assert not zeros & set(chosen) or set(names) - zeros <= set(chosen), "a score of 0 draws last"


def test_a_lottery_draws_anew_at_every_choice_and_for_every_seed() -> None:
    names = tuple("abcdefghijklmnop")
    even = dict.fromkeys(names, 1.0)
    by_step = {_selector(names=names, draw="lottery").choose(even, TOKENS, steps) for steps in range(0, 200, 20)}
    by_seed = {_selector(names=names, draw="lottery", seed=seed).choose(even, TOKENS, 2) for seed in range(10)}
    assert len(by_step) > 5
    assert len(by_seed) > 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("policy", SCORED)
def test_scores_that_are_not_finite_end_the_edges_round(policy: str, bad: float) -> None:
    with pytest.raises(UpdateRefusedError) as caught:
        _choose([1.0, bad, 2.0, bad], policy=policy)
    assert caught.value.got == f"{bad} for b, and for 1 other modules of 4"


@given(st.integers(1, 5), st.integers(6, 15), st.integers(0, 60))
def test_all_are_active_in_a_window_and_the_chosen_between(window_steps: int, period_steps: int, step: int) -> None:
    selector = _selector(observe_steps=window_steps, every=period_steps)
    assert selector.active(step, None) == ("a", "b", "c", "d")
    in_window = step % period_steps < window_steps
    assert selector.active(step, ("c", "a")) == (("a", "b", "c", "d") if in_window else ("a", "c"))


def test_a_selector_comes_from_the_configuration() -> None:
    config = RunConfig.model_validate({"select": {"policy": "random", "keep": 0.5}, "wire": {"mode": "factored"}, "run": {"seed": 3}})
    north, again, south = (selector_of(config, SHAPES, RANKS, edge=edge, epoch_steps=10) for edge in ("n", "n", "s"))
    assert north == again
    assert (north.d_model, north.wire.mode, len(north.pool), north.schedule.window_steps) == (8, "factored", 20, 0)
    assert len(north.choose({}, TOKENS, 2)) == 10
    assert north.choose({}, TOKENS, 2) != south.choose({}, TOKENS, 2)
    revive = config.model_copy(update={"select": Select(policy="kill-and-revive")})
    with pytest.raises(ConflictError, match="no shorter than its period") as caught:
        selector_of(revive, SHAPES, RANKS, edge="n", epoch_steps=10)
    assert "edge n" in caught.value.where


def test_a_full_pool_share_below_an_eighth_is_no_warning() -> None:
    assert schedule_warning(_selector(observe_steps=2, every=17), 170) is None
    assert schedule_warning(_selector("early-kill", observe_steps=12), 100) is None
    assert schedule_warning(_selector(observe_steps=2, every=17), 0) is None
    for policy in ("all", "random", "last-layers"):
        assert "observation" not in (schedule_warning(_selector(policy, observe_steps=9), 10) or "")


def test_a_period_that_never_ends_is_a_warning() -> None:
    assert "stays to the end: every = 100, and there are 60 steps" in (schedule_warning(_selector(observe_steps=2, every=100), 60) or "")
    assert schedule_warning(_selector(observe_steps=2, every=59), 60) is None
    assert schedule_warning(_selector("early-kill", observe_steps=2, every=100), 60) is None


def test_a_large_full_pool_share_is_a_warning_with_its_arithmetic() -> None:
    share = schedule_warning(_selector(observe_steps=10, every=40, keep=0.2), 400) or ""
    assert "25.0% of 400 steps" in share
    assert "(1 - 0.25) x (1 - 0.2) = 60.0%" in share
    assert "observe_steps = 4 or every = 98" in share
    budget = schedule_warning(_selector(observe_steps=5, every=40, threshold="budget", budget=0.5), 400) or ""
    assert "(1 - 0.125) x (1 - 0.5) = 43.8%" in budget
    mean = schedule_warning(_selector("early-kill", observe_steps=50, threshold="mean"), 100) or ""
    assert "(1 - 0.5) = 50.0%" in mean
    assert "observe_steps = 12 below" in mean
    assert "more steps" in (schedule_warning(_selector("snip", observe_steps=50), 5) or "")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 60), st.integers(1, 300))
def test_what_the_warning_advises_helps(window_steps: int, longer: int, total_steps: int) -> None:
    plain = {"observe_steps": window_steps, "every": window_steps + longer}
    warning = schedule_warning(_selector(**plain), total_steps)  # type: ignore[arg-type]
    assert ("observation" not in (warning or "")) == (_selector(**plain).schedule.full_pool_share(total_steps) < 0.125)  # type: ignore[arg-type]
    for name, value in re.findall(r"(observe_steps|every) = (\d+)", (warning or "").rpartition(";")[2]):
        better = schedule_warning(_selector(**{**plain, name: int(value)}), total_steps)  # type: ignore[arg-type]
        assert "observation" not in (better or "")
