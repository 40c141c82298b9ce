"""The plan of every edge: what run.toml says where it fits, recomputation where it must, and a refusal that helps where it cannot."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.config.schema import RunConfig
from atoll.cost.formulas import adapter_parameters, message_bytes
from atoll.errors import InfeasibleError, TargetError
from atoll.planner.edge_plan import FleetPlan
from atoll.planner.feasibility import Setting, largest_batch
from atoll.planner.plan_fleet import plan_fleet
from atoll.shapes import BaseShapes, ModuleShape
from atoll.training.trainer import FitPlan

PARTS = (
    ("self_attn.q_proj", 512, 512, "attention"), ("self_attn.o_proj", 512, 512, "attention"),
    ("mlp.gate_proj", 512, 1376, "mlp"), ("mlp.up_proj", 512, 1376, "mlp"), ("mlp.down_proj", 1376, 512, "mlp"),
)  # fmt: skip
NUM_BLOCKS = 24
MODULES = tuple(
    ModuleShape(f"model.layers.{b}.{name}", i, o, kind, b)  # type: ignore[arg-type]
    for b in range(NUM_BLOCKS)
    for name, i, o, kind in PARTS
)
BASE = BaseShapes("llama", 70 * 10**6, MODULES, 512, 8192, NUM_BLOCKS, 1024, True, 2.0, 8, 512, False)


def config(edges: tuple[dict[str, object], ...] = (), **sections: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate({**sections, "edge": edges})


def edge(name: str = "north", **fields: object) -> dict[str, object]:
    return {"name": name, **fields}


def plan(edges: tuple[dict[str, object], ...] = (), rows: dict[str, int] | None = None, **sections: dict[str, object]) -> FleetPlan:
    return plan_fleet(config(edges, **sections), BASE, rows)


def test_without_edges_there_is_one_local_edge_that_does_what_run_toml_says() -> None:
    fleet = plan(train={"batch_size": 4, "accumulate": 2, "local_steps": 7}, adapter={"rank": 3, "targets": "attention"})
    (only,) = fleet.edges
    assert (only.name, only.mode, only.bits, only.binding, only.predicted_seconds) == ("local", "local", 32, "none", None)
    assert (only.batch_size, only.accumulate, only.num_steps, only.gradient_checkpointing) == (4, 2, 7, False)
    assert only.ranks == {m.name: 3 for m in MODULES if m.kind == "attention"}
    assert fleet.num_trainable == adapter_parameters(BASE, only.ranks)
    assert only.up_bytes == only.down_bytes == 4 * fleet.num_trainable


def test_an_edge_may_have_a_rank_of_its_own() -> None:
    fleet = plan((edge("a", rank=2), edge("b")), adapter={"rank": 4, "targets": "q_proj"})
    assert [set(one.ranks.values()) for one in fleet.edges] == [{2}, {4}]
    assert fleet.edge("b").up_bytes == 2 * fleet.edge("a").up_bytes
    assert fleet.num_trainable == adapter_parameters(BASE, fleet.edge("b").ranks)


def test_ranks_of_a_start_adapter_hold() -> None:
    ranks = {MODULES[0].name: 5, MODULES[3].name: 2}
    fleet = plan_fleet(config((edge("a"), edge("b", rank=1))), BASE, None, start_ranks=ranks)
    assert fleet.edge("a").ranks == ranks
    assert set(fleet.edge("b").ranks.values()) == {1}


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(1.0, 80, 10), (0.5, 80, 5), (1.0, 81, 11), (0.01, 5, 1), (3.0, 16, 6)])
def test_epochs_become_steps_by_the_edges_rows(epochs: float, rows: int, steps: int) -> None:
    fleet = plan(rows={"local": rows}, train={"local_epochs": epochs, "batch_size": 4, "accumulate": 2})
    assert fleet.edges[0].num_steps == steps


@pytest.mark.parametrize(("rows", "batch_size", "accumulate"), [(9, 2, 2), (10, 4, 3), (8, 2, 2), (3, 4, 2), (7, 1, 4)])
def test_an_epoch_is_every_row_once(rows: int, batch_size: int, accumulate: int) -> None:
    epoch_batches = -(-rows // batch_size)
    fleet = plan(rows={"local": rows}, train={"local_epochs": 2.0, "batch_size": batch_size, "accumulate": accumulate})
    fit = FitPlan(fleet.edges[0].num_steps, accumulate, False, epoch_batches)
    numbers = [number for step in range(fit.num_steps) for number in fit.micro_batches(step)]
    assert numbers == list(range(2 * epoch_batches))
    assert max(len(fit.micro_batches(step)) for step in range(fit.num_steps)) <= accumulate


def test_half_precision_halves_the_base() -> None:
    full, half = (plan(model={"precision": precision}).edges[0] for precision in ("fp32", "bf16"))
    assert (full.bits, half.bits) == (32, 16)
    assert full.predicted_peak_bytes - half.predicted_peak_bytes > 2 * BASE.num_parameters


def test_rows_are_never_longer_than_the_base_has_positions() -> None:
    short = plan(data={"max_length": 1024}).edges[0].predicted_peak_bytes
    assert plan(data={"max_length": 9999}).edges[0].predicted_peak_bytes == short


@pytest.mark.parametrize("policy", ["kill-and-revive", "last-layers"])
def test_merged_modules_have_a_second_weight_where_their_blocks_run(policy: str) -> None:
    def peak(killed: str, policy: str = policy, **fields: object) -> int:
        select = {"policy": policy, "killed": killed}
        (only,) = plan((edge(**fields),), select=select, adapter={"targets": "attention"}, model={"cut": {"front": 1, "back": 2}}).edges
        return only.predicted_peak_bytes

    per_block = 4 * 2 * 512 * 512
    assert peak("skip") == peak("offload")
    assert peak("merge") - peak("offload") == NUM_BLOCKS * per_block
    assert peak("merge", mode="split") - peak("offload", mode="split") == 3 * per_block
    assert peak("merge", policy="all") == peak("offload", policy="all")


def test_memory_that_is_too_small_for_merged_copies_is_refused() -> None:
    select = {"policy": "random", "killed": "offload"}
    least = plan(select=select, train={"gradient_checkpointing": True}).edges[0].predicted_peak_bytes
    plan((edge(memory=least),), select=select)
    with pytest.raises(InfeasibleError):
        plan((edge(memory=least),), select=select | {"killed": "merge"})


def test_declared_memory_switches_recomputation_on_only_where_it_must() -> None:
    free = plan().edges[0].predicted_peak_bytes
    roomy, tight = plan((edge("roomy", memory=2 * free), edge("tight", memory=free - 1))).edges
    assert (roomy.gradient_checkpointing, roomy.binding) == (False, "none")
    assert (tight.gradient_checkpointing, tight.binding) == (True, "memory")
    assert tight.predicted_peak_bytes < free
    assert "batch_size = 16" in roomy.why
    assert "checkpointing" in tight.why


def test_recomputation_that_is_forbidden_stays_off() -> None:
    free = plan().edges[0].predicted_peak_bytes
    with pytest.raises(InfeasibleError) as caught:
        plan((edge(memory=free - 1),), train={"gradient_checkpointing": False})
    assert 'gradient_checkpointing = "auto"' in caught.value.do
    assert plan(train={"gradient_checkpointing": True}).edges[0].gradient_checkpointing


def test_every_edge_that_is_too_small_is_named_with_what_would_fit() -> None:
    with pytest.raises(InfeasibleError) as caught:
        plan((edge("north", memory=900 * 10**6), edge("south", memory=10**12), edge("west", memory=10**8)))
    page = caught.value.page()
    assert caught.value.exit_status == 3
    assert all(word in page for word in ("north", "west", "more", "declares 900 MB"))
    assert "south" not in page
    assert [line.split()[0] for line in caught.value.expected.splitlines()] == ["north", "west"]
    assert [line.split()[:3] for line in caught.value.do.splitlines()] == [["for", "north", "write"], ["for", "west", "declare"]]


@pytest.mark.parametrize(("mode", "policy", "advice"), [
    ("local", "as-written", "batch_size = 1, bits = 4, max_length = 16 and rank = 32"),
    ("local", "fedadapter", "batch_size = 1, bits = 4, max_length = 16 and plan.ranks of at most 32"),
    ("split", "as-written", "batch_size = 1, max_length = 16 and rank = 32"),
])  # fmt: skip
def test_the_advice_names_keys_that_decide(mode: str, policy: str, advice: str) -> None:
    with pytest.raises(InfeasibleError) as caught:
        plan(
            (edge(memory=2 * 10**8, mode=mode, process_memory=0),), adapter={"rank": 512}, plan={"policy": policy, "ranks": (64, 512)},
        )  # fmt: skip
    assert caught.value.do == f"for north write {advice}"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(6 * 10**8, 10**10))
def test_what_the_refusal_advises_does_fit(memory_bytes: int) -> None:
    edges = (edge(memory=memory_bytes),)
    try:
        fleet = plan(edges, train={"batch_size": 64})
    except InfeasibleError as problem:
        advised = dict(re.findall(r"(batch_size|max_length|rank|bits) = \"?(\w+)", problem.do))
        if advised:
            plan(
                (edge(memory=memory_bytes, bits=int(advised["bits"]) if "bits" in advised else None),),
                train={"batch_size": int(advised["batch_size"])},
                data={"max_length": int(advised.get("max_length", 256))},
                adapter={"rank": int(advised.get("rank", 8))},
            )
    else:
        assert fleet.edges[0].predicted_peak_bytes <= memory_bytes


def test_the_largest_batch_fits_and_its_double_does_not() -> None:
    setting = Setting(BASE, {MODULES[0].name: 4}, 32, 2, 128, False)
    limit = 2 * setting.peak_bytes
    batch = largest_batch(setting, limit)
    fits, double = (dataclasses.replace(setting, batch_size=size).peak_bytes for size in (batch, 2 * batch))
    assert fits <= limit < double


def test_seconds_come_from_declared_speed_and_link() -> None:
    slow, fast = plan((edge("slow", flops=1e9, bandwidth=1e6, latency=0.5), edge("fast", flops=1e12))).edges
    assert slow.predicted_seconds is not None
    assert fast.predicted_seconds is not None
    wrapping = 2 * message_bytes(BASE, len(slow.ranks)) + message_bytes(BASE, 0)
    transfer = 8 * (slow.up_bytes + slow.down_bytes + wrapping) / 1e6 + 1.0
    assert slow.predicted_seconds == pytest.approx(1000 * fast.predicted_seconds + transfer)


def test_a_split_edge_waits_for_every_exchange_of_its_whole_pool() -> None:
    """21 blocks in the host, each with two groups: into attention and out of it. Only latency is declared: bytes take no time."""
    train = {"local_steps": 5, "accumulate": 3}
    for policy in ("all", "last-layers"):
        (only,) = plan(
            (edge(mode="split", latency=0.5),), train=train, adapter={"targets": "attention"}, model={"cut": {"front": 1, "back": 2}},
            select={"policy": policy}, wire={"mode": "dense"},
        ).edges  # fmt: skip
        assert only.predicted_seconds == 1 + 5 * 3 * (2 * 42 + 2)
    (local,) = plan((edge(latency=0.5),), train=train).edges
    assert local.predicted_seconds == 1


def test_the_run_lasts_as_long_as_its_slowest_edge() -> None:
    fleet = plan((edge("a", flops=1e12), edge("b", flops=2e12)), run={"rounds": 4})
    assert fleet.predicted_seconds == 4 * (fleet.edge("a").predicted_seconds or 0)
    assert plan((edge("a", flops=1e12), edge("b"))).predicted_seconds is None


def test_unmatched_targets_are_refused() -> None:
    with pytest.raises(TargetError):
        plan(adapter={"targets": "q_porj"})


def test_a_plan_is_one_json_document() -> None:
    fleet = plan((edge("a", rank=2), edge("b")), run={"rounds": 3})
    document = json.loads(json.dumps(fleet.to_json()))
    assert document["up_bytes"] == 3 * sum(one["up_bytes"] for one in document["edges"])
    assert set(document["edges"][0]) == {field.name for field in dataclasses.fields(fleet.edges[0])}
