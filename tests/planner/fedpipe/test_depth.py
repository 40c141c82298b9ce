"""Which blocks a planner adapts: as many as it is told, or as teach most in a time."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.cost.formulas import step_flops
from atoll.planner.fedpipe.depth import top_blocks

from tests.planner.fedpipe.bases import base
from tests.planner.fedpipe.fleets import config, planned

SHAPES = base(6)
POOL = [module.name for module in SHAPES.modules if module.last_name != "v_proj" and module.block != 2]
"""Nothing of one block, as targets may have it."""


def blocks(names: tuple[str, ...]) -> list[int]:
    return sorted({module.block for module in SHAPES.modules if module.name in names})


@pytest.mark.parametrize(("depth", "expected"), [("all", [0, 1, 3, 4, 5]), (1, [5]), (4, [1, 3, 4, 5]), (9, [0, 1, 3, 4, 5])])
def test_a_number_counts_blocks_that_hold_targets_from_the_top(depth: int | str, expected: list[int]) -> None:
    names = top_blocks(SHAPES, POOL, depth, 8, 32)  # type: ignore[arg-type]
    assert blocks(names) == expected
    assert list(names) == [name for name in POOL if int(name.split(".")[2]) in expected], "all targets of a block, in the pool's order"


@given(part=st.sampled_from(["q_proj", "down_proj", "proj"]), tokens=st.sampled_from([1, 32, 500]), rank=st.sampled_from([1, 64]))
@settings(max_examples=20, deadline=None)
def test_by_itself_it_is_the_depth_at_which_most_is_learned_in_a_time(part: str, tokens: int, rank: int) -> None:
    pool = [name for name in POOL if name.endswith(part)]

    def pace(depth: int) -> float:
        names = top_blocks(SHAPES, pool, depth, rank, tokens)
        flops = step_flops(SHAPES, dict.fromkeys(names, rank), num_rows=1, row_tokens=tokens, num_label_tokens=tokens).flops
        return (depth / 5) ** (1 / 3) / flops

    found = top_blocks(SHAPES, pool, "auto", rank, tokens)
    assert pace(len(blocks(found))) == pytest.approx(max(map(pace, range(1, 6))))


def test_the_dearer_the_head_the_more_blocks() -> None:
    """What every step costs anyway is no reason to adapt less."""
    depths = [
        len(blocks(top_blocks(dataclasses.replace(SHAPES, vocab_size=size), POOL, "auto", 8, 32))) for size in (10, 1_000, 100_000)
    ]
    assert depths == sorted(depths)
    assert depths[0] < depths[-1] == 5


def test_a_plan_says_so_and_warms_up_on_all_weights() -> None:
    sections = {"adapter": {"targets": "all-linear"}}
    whole, top = (planned(config([{"flops": 1e9}], {"depth": depth}, **sections), SHAPES) for depth in ("all", 2))
    (now,) = top.edges
    assert blocks(tuple(now.ranks)) == [4, 5]
    assert len(top.pool) == len(SHAPES.modules), "all of them are scored"
    assert "only 12 weights, those of the top blocks, may be adapted" in now.why
    assert "top blocks" not in whole.edges[0].why
    assert now.objective is not None
    assert now.objective < 0.9 * (whole.edges[0].objective or 0.0), "worth is a share of all weights'"
    assert (now.predicted_seconds or 0.0) < 0.8 * (whole.edges[0].predicted_seconds or 0.0)
