"""The frozen delta: as wide as plans say, never wider, and part of what they cost."""

from __future__ import annotations

import doctest
import time
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.cost.formulas import message_bytes
from atoll.errors import InfeasibleError
from atoll.federated.aggregation.aggregate import Aggregator, Common, Contribution, started
from atoll.federated.aggregation.edge_parts import EdgeParts
from atoll.planner import frozen_delta as room
from atoll.planner.edge_plan import FleetPlan
from atoll.planner.frozen_delta import frozen_delta
from atoll.shapes import BaseShapes, ModuleShape

from tests.planner.fedpipe.bases import base
from tests.planner.fedpipe.fleets import config as planner_config
from tests.planner.fedpipe.fleets import planned
from tests.planner.test_plan import BASE, MODULES, edge, plan

ONE = BaseShapes("llama", 10**4, (ModuleShape("h.0.mlp.fc1", 24, 16, "mlp", 0),), 24, 50, 1, 64, True, 4.0, 2, 24, False)
NAME = ONE.modules[0].name
Q_PROJ = {"targets": "q_proj", "rank": 4}
NUMBERS = 24 * 1024
"""Of adapters of rank 1 on every query projection of BASE."""


def test_the_worked_example() -> None:
    failed, tried = doctest.testmod(room)
    assert (failed, tried) == (0, 3)


def moved(state: AdapterState, random: torch.Generator) -> AdapterState:
    """As after some steps: every number is another."""
    def other(one: ModuleAdapter) -> ModuleAdapter:
        down, up = (matrix + torch.randn(matrix.shape, generator=random) for matrix in one.tensors)
        return ModuleAdapter(down, up, one.scaling)

    return AdapterState(state.kind, {name: other(one) for name, one in state.modules.items()})


def widths(rule: str, ranks: Sequence[int], rounds: int, seed: int, absent: Mapping[int, int] = {}) -> list[int]:
    """Rank of the module's frozen delta at the beginning of every round; in round r edge `absent[r]` sends nothing."""
    random, names = torch.Generator().manual_seed(seed), [f"edge-{number}" for number in range(len(ranks))]
    common = started(fresh_adapters("lora", {NAME: (24, 16)}, {NAME: max(ranks)}, 16.0, 0), rule, 0)  # type: ignore[arg-type]
    found = []
    for number in range(rounds):
        found.append(common.frozen_delta.ranks[NAME] if common.frozen_delta is not None else 0)
        aggregator = Aggregator(rule, common, {NAME: max(ranks)}, round=number)  # type: ignore[arg-type]
        parts = EdgeParts(common.trained, rule)  # type: ignore[arg-type]
        for own, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            if absent.get(number) != own:
                given = parts.of({NAME: rank})
                aggregator.add(Contribution(name, moved(given, random), 1 + own), given)
        common = aggregator.finish().common
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(["stack", "residual", "exact-svd", "delta-svd", "zero-pad"]),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_it_is_as_wide_in_every_round_as_real_updates_make_it(rule: str, ranks: list[int], seed: int) -> None:
    edges = [{NAME: rank} for rank in ranks]
    foretold = [one.ranks.get(NAME, 0) for one in frozen_delta(rule, ONE, [(1, edges)] * 4)]
    assert widths(rule, ranks, 4, seed) == foretold
    fewer = widths(rule, ranks, 4, seed, {number: number % len(ranks) for number in range(4)}) if len(ranks) > 1 else []
    assert all(got <= most for got, most in zip(fewer, foretold, strict=False)), "an edge that does not answer adds nothing"


def test_a_start_adapter_becomes_the_frozen_delta_where_adapters_start_anew() -> None:
    edges = [{NAME: 2}]
    by_rule = {rule: frozen_delta(rule, ONE, [(3, edges)], {NAME: 5})[0].ranks for rule in ("stack", "residual", "exact-svd")}
    assert by_rule == {"stack": {NAME: 9}, "residual": {}, "exact-svd": {}}
    state = moved(fresh_adapters("lora", {NAME: (24, 16)}, {NAME: 5}, 16.0, 0), torch.Generator().manual_seed(0))
    assert isinstance(common := started(state, "stack", 0), Common)
    assert common.frozen_delta is not None
    assert common.frozen_delta.ranks == {NAME: 5}


def by(rule: str, *edges: dict[str, object], rounds: int = 3, **sections: dict[str, object]) -> FleetPlan:
    return plan(edges, run={"rounds": rounds}, federated={"aggregation": rule, **sections.pop("federated", {})}, adapter=Q_PROJ, **sections)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2)])
def test_bytes_of_the_run_are_a_sum_over_its_rounds_by_hand(precision: str, size: int) -> None:
    """Ranks 4 and 2: stack adds 6 to every round, residual 4; an edge that hands its rows over is sent nothing and adds its own 4."""
    alike = 3 * size * NUMBERS * (4 + 2)
    for rule, added in (("stack", 6), ("residual", 4), ("exact-svd", 0)):
        fleet = by(rule, edge("a"), edge("b", rank=2), federated={"precision": precision})
        assert fleet.up_bytes == alike
        assert fleet.down_bytes == alike + 2 * size * NUMBERS * (0 + added + 2 * added)
        assert [one.down_bytes for one in fleet.edges] == [size * NUMBERS * (rank + 2 * added) for rank in (4, 2)]
        assert [one.up_bytes for one in fleet.edges] == [size * NUMBERS * rank for rank in (4, 2)]
    fleet = by("stack", edge("a"), edge("b", mode="cloud"))
    assert fleet.down_bytes == 4 * NUMBERS * (3 * 4 + 8 + 16)


def test_seconds_and_memory_are_those_of_the_last_round_by_hand() -> None:
    declared = {"bandwidth": 1e6, "latency": 0.5}
    plain, stacked = (by(rule, edge("a", **declared)).edges[0] for rule in ("exact-svd", "stack"))
    wrapping, delta_wrapping = message_bytes(BASE, 24), message_bytes(BASE, 24) - message_bytes(BASE, 0)
    wrapped = 2 * wrapping + message_bytes(BASE, 0)
    assert plain.predicted_seconds == pytest.approx(8 * (4 * NUMBERS * (4 + 4) + wrapped) / 1e6 + 1)
    assert stacked.predicted_seconds == pytest.approx(8 * (4 * NUMBERS * (4 + 4 + 8) + wrapped + delta_wrapping) / 1e6 + 1)
    assert stacked.predicted_peak_bytes - plain.predicted_peak_bytes == 12 * NUMBERS * 8
    half, more = (by(rule, edge("a"), model={"precision": "bf16"}).edges[0] for rule in ("exact-svd", "stack"))
    assert more.predicted_peak_bytes - half.predicted_peak_bytes == 14 * NUMBERS * 8


def test_work_is_that_of_frozen_adapters() -> None:
    """Forward and back to the input, 4 N r (d_in + d_out), but for the lowest projection, whose input needs no gradient."""
    speed = {"flops": 1.0}
    train = {"batch_size": 2, "local_steps": 1}
    plain, stacked = (by(rule, edge("a", **speed), train=train).edges[0].predicted_seconds for rule in ("exact-svd", "stack"))
    assert plain is not None
    assert stacked == pytest.approx(plain + (4 * 24 - 2) * 2 * 256 * 8 * 1024, rel=1e-12)


def test_too_little_memory_for_the_last_round_is_told_before_the_first() -> None:
    needed = by("stack", edge("a"), train={"gradient_checkpointing": True}, rounds=20).edges[0].predicted_peak_bytes
    by("stack", edge("a", memory=needed), rounds=20)
    with pytest.raises(InfeasibleError) as caught:
        by("stack", edge("a", memory=needed - 1), rounds=20)
    assert f"frozen delta {12 * NUMBERS * 19 * 4 / 1e6:.1f} MB" in caught.value.expected
    by("stack", edge("a", memory=needed - 1), rounds=19)
    by("exact-svd", edge("a", memory=needed - 1), rounds=20)


def test_those_that_are_left_out_add_nothing() -> None:
    both = by("stack", edge("a"), edge("small", memory=10**8), plan={"infeasible": "leave-out"})
    assert [one.name for one in both.left_out] == ["small"]
    assert both.down_bytes == by("stack", edge("a")).down_bytes


def test_fewer_steps_are_planned_so_that_the_last_round_ends_in_time() -> None:
    limits = {"plan": {"round_deadline": 60.0}, "train": {"local_steps": 100, "batch_size": 1}}
    declared = {"flops": 1e11, "bandwidth": 8e5}
    plain, stacked = (
        by(rule, edge("a", **declared), federated={"late": "cut"}, rounds=5, **limits).edges[0] for rule in ("exact-svd", "stack")
    )
    assert 0 < stacked.num_steps < plain.num_steps < 100
    assert stacked.predicted_seconds is not None
    assert stacked.predicted_seconds <= 60


@pytest.mark.parametrize("rule", ["stack", "residual"])
@pytest.mark.parametrize("short_of", ["memory", "time"])
def test_a_planner_leaves_room_and_time_for_the_widest_that_may_lie_there(rule: str, short_of: str) -> None:
    """Ranks of 1 and 4 to choose from: three edges by stack add 12 to every round, by residual 8. All have a little too little of one."""
    sections = {
        "run": {"rounds": 3, "placement": "auto"}, "model": {"precision": "bf16"},
        "train": {"batch_size": 4, "local_steps": 3, "gradient_checkpointing": False},
    }  # fmt: skip
    machine = {"mode": "local", "bits": 16, "flops": 1e9, "bandwidth": 1e6}
    free = planned(planner_config([machine], {"round_deadline": 100.0, "batch_sizes": (4,)}, **sections))
    added = {"stack": 12, "residual": 8}[rule]
    lying = frozen_delta(rule, base(2), [(3, [dict.fromkeys(free.pool, 4)] * 3)])[0]
    assert lying.ranks == dict.fromkeys(free.pool, 2 * added)
    memory, deadline = free.edges[0].predicted_peak_bytes + 7 * lying.last_bytes // 2, free.edges[0].predicted_seconds
    assert deadline is not None
    less = [100, 3000, 9000] if short_of == "memory" else [0, 0, 0]
    edges = [{**machine, "memory": memory - part} for part in less]
    deadline = 100.0 if short_of == "memory" else deadline + 8 * lying.last_bytes / 1e6 + frozen_seconds(lying.ranks) - 0.001
    plan = {"round_deadline": deadline, "batch_sizes": (4,)}
    fleets = {name: planned(planner_config(edges, plan, federated={"aggregation": name}, **sections)) for name in (rule, "exact-svd")}
    for one, asked in zip(fleets[rule].edges, edges, strict=True):
        assert one.predicted_seconds is not None
        assert one.predicted_seconds <= deadline * (1 + 1e-12)
        assert one.predicted_peak_bytes <= asked["memory"]
        assert one.down_bytes - one.up_bytes == lying.last_bytes
        assert one.objective is not None
        assert 0.4 < one.objective < 1
    assert all(one.objective == pytest.approx(1) for one in fleets["exact-svd"].edges)


def frozen_seconds(ranks: Mapping[str, int]) -> float:
    """At 1 GFLOP/s, for 3 steps of 4 rows of 32 tokens, forward and back; below the first projection nothing goes back."""
    sizes = {module.name: module.d_in + module.d_out for module in base(2).modules}
    first = next(iter(ranks))
    return sum(2 * 3 * 4 * 32 * rank * sizes[name] * (1 if name == first else 2) for name, rank in ranks.items()) / 1e9


def test_a_planner_is_not_slower_for_it() -> None:
    """Looking at the frozen delta, over many rounds of many edges, takes a moment."""
    edges = [dict.fromkeys([module.name for module in MODULES], 1 + number % 16) for number in range(100)]
    begin = time.perf_counter()
    assert frozen_delta("stack", BASE, [(100, edges)])[0].ranks[MODULES[0].name] == 512
    assert time.perf_counter() - begin < 1
