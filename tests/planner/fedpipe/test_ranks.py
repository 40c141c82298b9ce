"""The best ranks under limits: as good as trying everything, never above a limit, never worse with more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.config.schema import RunConfig
from atoll.planner.fedpipe.ranks import Chosen, Limit, best_ranks
from atoll.planner.fedpipe.table import CostsOf, stages_of

from tests.planner.fedpipe.bases import base, costs_of

SPEED, RATE, THERE = 1e9, 1e6, 4e9


def limits(memory_bytes: float, seconds: float) -> tuple[Limit, Limit]:
    return Limit((1, 0, 0, 0, 0, 0), memory_bytes), Limit((0, 16 / RATE, 1 / SPEED, 8 / RATE, 0.01, 1 / THERE), seconds)


def used(costs: CostsOf, ranks: Mapping[str, int]) -> tuple[float, float]:
    of = costs(ranks)
    wire_bytes, without_steps = of.up_bytes + of.down_bytes, 2 * of.payload_bytes + of.wrapping_bytes
    return of.memory_bytes, of.flops / SPEED + 8 * (without_steps + wire_bytes) / RATE + 0.01 * of.round_trips + of.host_flops / THERE


def worth(importance: Mapping[str, float], ranks: Mapping[str, int]) -> float:
    return sum(importance[name] * math.log1p(rank) for name, rank in ranks.items())


def by_trying_everything(importance: Mapping[str, float], ranks: tuple[int, ...], costs: CostsOf, memory: float, seconds: float) -> float:
    best = 0.0
    for combination in itertools.product((0, *ranks), repeat=len(importance)):
        chosen = {name: rank for name, rank in zip(importance, combination, strict=True) if rank}
        # Equal to a limit is within it, whichever way the last bit of a sum was rounded.
        if chosen and all(a <= b * (1 + 1e-12) for a, b in zip(used(costs, chosen), (memory, seconds), strict=True)):
            best = max(best, worth(importance, chosen))
    return best


def between(low: tuple[float, float], high: tuple[float, float], share: float, which: int) -> float:
    return low[which] + share * (high[which] - low[which])


@pytest.mark.parametrize("mode", ["local", "split"])
@given(seed=st.integers(0, 10**6), memory_share=st.floats(-0.05, 1.1), time_share=st.floats(-0.05, 1.1))
@settings(max_examples=8, deadline=None)
def test_as_good_as_trying_everything(mode: str, seed: int, memory_share: float, time_share: float) -> None:
    shapes, config = base(2, parts=3), RunConfig.model_validate({"model": {"cut": {"front": 1, "back": 0}}})
    pool = [module.name for module in shapes.modules][1:]
    importance = dict(zip(pool, np.random.default_rng(seed).lognormal(size=len(pool)).tolist(), strict=True))
    costs, ranks = costs_of(shapes, config, mode), (1, 4)  # type: ignore[arg-type]
    everything = used(costs, dict.fromkeys(pool, 4))
    least = used(costs, {pool[-1]: 1})
    memory, seconds = (between(least, everything, share, which) for which, share in enumerate((memory_share, time_share)))
    found = best_ranks(stages_of(shapes, pool, ranks, importance, costs), limits(memory, seconds))
    best = by_trying_everything(importance, ranks, costs, memory, seconds)
    if found is None:
        assert best == 0
    else:
        assert found.objective == pytest.approx(worth(importance, found.ranks))
        assert found.objective == pytest.approx(best, rel=1e-5)
        memory_used, seconds_used = used(costs, found.ranks)
        assert memory_used <= memory * (1 + 1e-12)
        assert seconds_used <= seconds * (1 + 1e-9)


@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0), more=st.floats(0.0, 0.5))
@settings(max_examples=10, deadline=None)
def test_more_of_a_limit_never_makes_it_worse(seed: int, share: float, more: float) -> None:
    shapes, config = base(6), RunConfig()
    pool = [module.name for module in shapes.modules]
    importance = dict(zip(pool, np.random.default_rng(seed).lognormal(size=len(pool)).tolist(), strict=True))
    costs, ranks = costs_of(shapes, config), (2, 4, 8, 16)
    stages = stages_of(shapes, pool, ranks, importance, costs)
    least, most = used(costs, {pool[-1]: 2}), used(costs, dict.fromkeys(pool, 16))
    found: list[Chosen | None] = []
    for memory_share, time_share in ((share, 0.5), (share + more, 0.5), (share + more, 0.5 + more)):
        budget = tuple(between(least, most, one, which) for which, one in enumerate((memory_share, time_share)))
        found.append(best_ranks(stages, limits(*budget)))
        if found[-1] is not None:
            assert all(a <= b * (1 + 1e-9) for a, b in zip(used(costs, found[-1].ranks), budget, strict=True))
    objectives = [one.objective if one is not None else 0.0 for one in found]
    assert objectives[0] <= objectives[1] * (1 + 1e-5)
    assert objectives[1] <= objectives[2] * (1 + 1e-5)


def test_without_limits_every_weight_gets_the_largest_rank() -> None:
    shapes = base(3)
    pool = [module.name for module in shapes.modules]
    found = best_ranks(stages_of(shapes, pool, (2, 8), dict.fromkeys(pool, 1.0), costs_of(shapes, RunConfig())), ())
    assert found is not None
    assert found.ranks == dict.fromkeys(pool, 8)


def test_a_weight_without_importance_gets_no_adapter() -> None:
    shapes = base(2)
    pool = [module.name for module in shapes.modules]
    importance = {name: 0.0 if "q_proj" in name else 1.0 for name in pool}
    found = best_ranks(stages_of(shapes, pool, (2, 8), importance, costs_of(shapes, RunConfig())), ())
    assert found is not None
    assert found.ranks == {name: 8 for name in pool if "q_proj" not in name}


def test_important_weights_get_the_rank() -> None:
    shapes = base(2)
    pool = [module.name for module in shapes.modules if module.last_name in ("q_proj", "o_proj")]
    importance = {name: 10.0 if "q_proj" in name else 1.0 for name in pool}
    costs = costs_of(shapes, RunConfig())
    wanted = {name: 7 if "q_proj" in name else 2 for name in pool}
    found = best_ranks(stages_of(shapes, pool, (2, 7), importance, costs), limits(used(costs, wanted)[0], 1e9))
    assert found is not None
    assert found.ranks == {name: 7 if "q_proj" in name else 2 for name in pool}
