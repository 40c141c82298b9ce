"""Costs of ranks come apart into stages and add up again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.config.schema import RunConfig
from atoll.planner.fedpipe.table import KINDS, stages_of
from atoll.wire.byte_formulas import WireMode

from tests.planner.fedpipe.bases import base, costs_of

RANKS = (1, 3)
CASES = [
    ("local", {}, False), ("local", {}, True), ("split", {"model": {"cut": {"front": 1, "back": 1}}}, False),
    ("split", {"model": {"cut": {"front": 0, "back": 0}}}, False),
    ("split", {"model": {"cut": {"front": 1, "back": 0}}, "wire": {"codec": "int8"}}, True),
]  # fmt: skip


@pytest.mark.parametrize("wire_mode", ["dense", "factored", "lent"])
@pytest.mark.parametrize(("mode", "sections", "checkpointing"), CASES)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=4, deadline=None)
def test_a_choices_costs_are_the_sum_of_its_stages(
    mode: str, sections: dict[str, object], checkpointing: bool, wire_mode: WireMode, seed: int
) -> None:
    shapes, config, random = base(4), RunConfig.model_validate(sections), np.random.default_rng(seed)
    whole = costs_of(shapes, config, mode, checkpointing=checkpointing, wire_mode=wire_mode)  # type: ignore[arg-type]
    names = [module.name for module in shapes.modules]
    # Of worth that no option is beaten by another.
    stages = stages_of(shapes, names, RANKS, {name: 1.0 + random.random() for name in names}, whole)
    lowest = int(random.integers(len(stages)))
    ranks, total = {}, np.zeros(KINDS)
    for number in range(lowest, len(stages)):
        options = stages[number].lowest if number == lowest else stages[number].above
        pick = int(random.integers(len(options.values_O)))
        total += options.costs_OC[pick]
        ranks |= {module.name: rank for module, rank in zip(stages[number].modules, options.ranks[pick], strict=True) if rank}
    costs = whole(ranks)
    without_steps = costs.payload_bytes + costs.wrapping_bytes / 2
    expected = [costs.memory_bytes, without_steps, costs.flops, costs.up_bytes + costs.down_bytes, costs.round_trips, costs.host_flops]
    assert total[1:].tolist() == pytest.approx(expected[1:], rel=1e-12)
    assert total[0] == pytest.approx(expected[0], abs=2 * len(stages))  # memory is rounded down to bytes


def test_only_options_that_others_beat_are_left_out() -> None:
    shapes, config = base(2), RunConfig()
    worth = {module.name: 1.0 + number % 3 for number, module in enumerate(shapes.modules)}
    stages = stages_of(shapes, list(worth), (2, 4), worth, costs_of(shapes, config))
    query_key_value = stages[4].above
    assert query_key_value.ranks[0] == (0, 0, 0)
    by_cost = sorted(zip(query_key_value.costs_OC[:, 2], query_key_value.values_O, strict=True))
    values = [value for _, value in by_cost]
    assert values == sorted(values)
    assert len(values) < 27
    assert (4, 4, 4) in query_key_value.ranks
