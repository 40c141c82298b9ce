"""An edge follows what its run.toml can lead to, and nothing else; its owner may make that less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState
from atoll.config.load import LoadedConfig, load
from atoll.errors import AtollError, InputError, ManyErrors, OrderRefusedError
from atoll.jobs.backends.backend import WorkOrder
from atoll.jobs.backends.edge_policy import POLICY_FILE, EdgePolicy, policy_of, policy_toml, read_policy
from atoll.jobs.backends.work_orders import SentOrder, from_text, to_text
from atoll.jobs.backends.worker import Worker
from atoll.jobs.job import Job, grown_to, homogeneous, prepared, replanned
from atoll.planner.importance import Importance
from atoll.planner.request import WarmUpPlan

from tests.jobs.backends.test_worker import ROWS, classes_config
from tests.jobs.conftest import Sections, Workplace

TWO: dict[str, dict[str, object]] = {"north": {}, "south": {"rank": 2}}
FEDPIPE = {"policy": "fedpipe", "ranks": [2, 4], "batch_sizes": [1, 2], "warmup_steps": 2}


def orders(job: Job, phase: str = "federated", rounds_before: int = 0) -> Iterator[SentOrder]:
    """What a coordinator sends, as it arrives."""
    left = job.config.run.rounds - rounds_before
    for edge in job.edges:
        order = WorkOrder(edge.name, edge.plan, phase, left * edge.plan.num_steps, rounds_before)  # type: ignore[arg-type]
        yield from_text(to_text(order, job.plan.pool, job.base.labels, "run"))


HONEST: dict[str, tuple[Sections, Mapping[str, Mapping[str, object]], str]] = {
    "as written": ({}, TWO, "local_steps = 2"),
    "by epochs": ({}, TWO, "local_epochs = 1.5"),
    "accumulated": ({"train": {"accumulate": 3}}, TWO, "local_steps = 2"),
    "quantized": ({"model": {"quantize": 8}}, {"north": {}, "south": {"bits": 4}}, "local_steps = 2"),
    "half": ({"model": {"precision": "bf16"}}, TWO, "local_steps = 2"),
    "full": ({"adapter": {"kind": "full"}}, {"north": {}}, "local_steps = 2"),
    "bottleneck": ({"adapter": {"kind": "bottleneck"}}, {"north": {}}, "local_steps = 2"),
    "planned": ({"plan": FEDPIPE}, {"north": {"memory": "4 GB"}, "south": {"rank": 2}, "west": {"bits": 8}}, "local_steps = 2"),
    "filled": (
        {"plan": {**FEDPIPE, "steps": "fill", "round_deadline": "1 h"}}, {"north": {"flops": "1 TFLOP/s"}, "south": {"flops": "1 GFLOP/s"}},
        "local_steps = 2",
    ),
    "cut": (
        {"plan": {"round_deadline": "1 s"}, "federated": {"late": "cut"}}, {"north": {}, "south": {"flops": "50 MFLOP/s"}},
        "local_steps = 20",
    ),
    "odd batches": ({"plan": {**FEDPIPE, "batch_sizes": [4, 8]}, "train": {"batch_size": 3}}, {"north": {}}, "local_steps = 2"),
    "growing": ({"plan": {"policy": "fedadapter", "ranks": [2, 6]}}, {"north": {}, "south": {}}, "local_steps = 2"),
    "compared": ({"run": {"rounds": 2, "compare": ["local-only", "homogeneous"]}, "plan": FEDPIPE}, TWO, "local_steps = 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_what_run_toml_leads_to_is_followed(place: Workplace, name: str) -> None:
    sections, edges, steps = HONEST[name]
    path = place.config(edges, sections)
    path.write_text(path.read_text().replace("local_steps = 2", steps))
    loaded = load(path)
    job = prepared(loaded)
    phases = [(job, "federated")]
    if loaded.config.plan.decides:
        scores = {module: 1.0 + number % 3 for number, module in enumerate(job.plan.pool)}
        phases.append((replanned(job, Importance("svd-sensitivity", scores, dict.fromkeys(edges, 1))), "federated"))
    if loaded.config.run.compare:
        found = homogeneous(job)
        assert found is not None
        phases += [(job, "local-only"), (found, "homogeneous")]
    for one, phase in phases:
        for sent in (*orders(one, phase), *(orders(grown_to(one, 1), phase, 1) if name == "growing" else ())):
            edge = next(edge for edge in loaded.config.edge if edge.name == sent.order.edge)
            policy = read_text(place.folder, policy_toml(loaded.config, edge))
            worker = Worker(loaded, sent.order.edge, policy=policy)
            for number in range(sent.order.rounds_before + 1, loaded.config.run.rounds + 1):
                worker.check(sent, phase, number)
            if sent.order.plan.warm_up is not None and phase == "federated":
                worker.check(sent, "importance")
    job.close()


def read_text(folder: Path, text: str) -> EdgePolicy:
    (folder / POLICY_FILE).write_text(text)
    return read_policy(folder / POLICY_FILE)


@pytest.fixture
def loaded(place: Workplace) -> LoadedConfig:
    return load(place.config(TWO, {"run": {"rounds": 3}}))


@pytest.fixture
def sent(loaded: LoadedConfig) -> Iterator[SentOrder]:
    job = prepared(loaded)
    yield next(orders(job))
    job.close()


MODULE = "model.layers.0.self_attn.q_proj"
ASKED: dict[str, tuple[dict[str, object], str, str]] = {
    "10^9 steps": ({"num_steps": 10**9}, "1000000000 steps a round", "1 to 2 (run.toml)"),
    "10^400 steps": ({"num_steps": 10**400}, "a number of 1329 bits steps a round", "1 to 2 (run.toml)"),
    "no steps": ({"num_steps": 0}, "0 steps a round", "1 to 2 (run.toml)"),
    "10^9 micro-batches": ({"accumulate": 10**9}, "accumulate = 1000000000", "1 to 1 (run.toml)"),
    "10^9 rows": ({"batch_size": 10**9}, "1000000000 rows a micro-batch", "1 to 2 (run.toml)"),
    "no rows": ({"batch_size": 0}, "0 rows a micro-batch", "1 to 2 (run.toml)"),
    "other bits": ({"bits": 4}, "bits 4", "32 (run.toml)"),
    "no bits": ({"bits": 3}, "bits 3", "32 (run.toml)"),
    "in a host": ({"mode": "split"}, "mode 'split'", "local (run.toml)"),
    "lent without a host": ({"wire_mode": "lent"}, "wire mode 'lent'", "none without"),
    "rows handed over": ({"mode": "cloud"}, "mode 'cloud'", "local (run.toml)"),
    "a large rank": ({"ranks": {MODULE: 5}}, f"rank 5 for '{MODULE}'", "1 to 4"),
    "a huge rank": ({"ranks": {MODULE: 10**9}}, "1000000000 as the largest rank", "1 to 4 (run.toml)"),
    "a negative rank": ({"ranks": {MODULE: -1}}, f"rank -1 for '{MODULE}'", "1 to 4"),
    "no rank": ({"ranks": {MODULE: 0}}, f"rank 0 for '{MODULE}'", "1 to 4"),
    "a foreign module": ({"ranks": {"lm_head": 2}}, "rank 2 for 'lm_head'", "modules of the pool"),
    "another edge's plan": ({"name": "south"}, "a plan of 'south'", "north"),
    "a wide warm-up": ({"warm_up": WarmUpPlan(10**9, False)}, "1000000000 rows a micro-batch, for importance", "1 to 2 (run.toml)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_a_plan_beyond_run_toml_is_refused(loaded: LoadedConfig, sent: SentOrder, name: str) -> None:
    changes, got, expected = ASKED[name]
    order = replace(sent.order, plan=replace(sent.order.plan, **changes))  # type: ignore[arg-type]
    with pytest.raises(OrderRefusedError, match="does not follow") as caught:
        Worker(loaded, "north").check(replace(sent, order=order), "federated", 1)
    assert caught.value.where == "edge north"
    assert got in caught.value.got
    assert expected in caught.value.expected
    assert len(caught.value.page()) < 1500


TOLD: dict[str, tuple[dict[str, object], dict[str, object], int | None, str, str]] = {
    "another edge": ({"edge": "south"}, {}, 1, "federated", "an order for 'south'"),
    "too many in all": ({"total_steps": 10**9}, {}, 1, "federated", "1000000000 steps in all"),
    "none in all": ({"total_steps": 0}, {}, 1, "federated", "0 steps in all"),
    "round 0": ({}, {}, 0, "federated", "round 0"),
    "round 4 of 3": ({}, {}, 4, "federated", "round 4"),
    "round 10^400": ({}, {}, 10**400, "federated", "round a number of 1329 bits"),
    "from later": ({"rounds_before": 1}, {}, 1, "federated", "an order after round 1"),
    "from before the start": ({"rounds_before": -1}, {}, 1, "federated", "an order after round -1"),
    "a comparison": ({"phase": "local-only"}, {}, 1, "local-only", "task 'local-only'"),
    "one trainer of all rows": ({"phase": "central"}, {}, 1, "central", "task 'central'"),
    "importance": ({}, {}, None, "importance", "task 'importance'"),
    "classes": ({}, {"labels": ("no", "yes")}, 1, "federated", "2 classes"),
    "more modules": ({}, {"pool": ("model.layers.0.mlp.up_proj",)}, 1, "federated", "a pool of 1 module"),
    "no modules": ({}, {"pool": ()}, 1, "federated", "a pool of 0 modules"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_what_is_not_meant_is_refused(loaded: LoadedConfig, sent: SentOrder, name: str) -> None:
    order, whole, number, task, got = TOLD[name]
    told = replace(sent, order=replace(sent.order, **order), **whole)  # type: ignore[arg-type]
    with pytest.raises(OrderRefusedError) as caught:
        Worker(loaded, "north").check(told, task, number)
    assert got in caught.value.got


NARROWER: dict[str, tuple[EdgePolicy, str]] = {
    "steps": (EdgePolicy(steps=1), "1 to 1 (policy.toml)"), "bits": (EdgePolicy(bits=(8, 16)), "8 or 16 (policy.toml)"),
    "modes": (EdgePolicy(modes=("split",)), "split (policy.toml)"), "rank": (EdgePolicy(rank=3), "1 to 3 (policy.toml)"),
    "batch_size": (EdgePolicy(batch_size=1), "1 to 1 (policy.toml)"),
    "tasks": (EdgePolicy(tasks=("local-only",)), "local-only (policy.toml)"),
}  # fmt: skip


@pytest.mark.parametrize("key", NARROWER)
def test_an_order_beyond_the_policy_is_refused(loaded: LoadedConfig, sent: SentOrder, key: str) -> None:
    policy, expected = NARROWER[key]
    with pytest.raises(OrderRefusedError) as caught:
        Worker(loaded, "north", policy=policy).check(sent, "federated", 1)
    assert caught.value.expected == expected


def test_all_that_is_wrong_is_said_at_once(loaded: LoadedConfig, sent: SentOrder) -> None:
    order = replace(sent.order, plan=replace(sent.order.plan, num_steps=9, bits=8))
    with pytest.raises(OrderRefusedError) as caught:
        Worker(loaded, "north", policy=EdgePolicy(rank=1)).check(replace(sent, order=order), "federated", 1)
    assert caught.value.got == "9 steps a round, bits 8, 4 as the largest rank"
    assert caught.value.expected == "1 to 2 (run.toml), 32 (run.toml), 1 to 1 (policy.toml)"


def test_an_adapter_of_other_modules_or_ranks_than_the_order_is_refused(loaded: LoadedConfig, sent: SentOrder) -> None:
    worker, ranks = Worker(loaded, "north"), dict(sent.order.plan.ranks)
    sizes = dict.fromkeys(ranks, (16, 16))
    worker.check(sent, "federated", 1, fresh_adapters("lora", sizes, ranks, 8, 0))
    for other in ({**ranks, MODULE: 64}, {MODULE: 4}, {}):
        with pytest.raises(OrderRefusedError, match="does not follow"):
            worker.check(sent, "federated", 1, fresh_adapters("lora", sizes, other, 8, 0) if other else AdapterState("lora", {}))


def test_classes_are_those_of_the_run_and_of_the_edge(place: Workplace) -> None:
    (place.folder / "classes.csv").write_text("\n".join(ROWS) + "\n")
    loaded = load(classes_config(place, {"north": {}}))
    job = prepared(loaded)
    (sent,) = orders(job)
    worker = Worker(loaded, "north")
    worker.check(sent, "federated", 1)
    worker.check(replace(sent, labels=("maybe", "no", "yes")), "federated", 1)
    for labels in ((), ("no",), ("maybe", "no"), ("no", "yes", "yes"), ("no", "yes", "x" * 2000)):
        with pytest.raises(OrderRefusedError):
            worker.check(replace(sent, labels=labels), "federated", 1)


def test_a_policy_is_read_back_as_the_limits_of_run_toml(place: Workplace) -> None:
    loaded = load(place.config(TWO, {"federated": {"round_timeout": "10 min"}, "plan": FEDPIPE}))
    edge = loaded.config.edge[0]
    text = policy_toml(loaded.config, edge)
    assert read_text(place.folder, text) == policy_of(loaded.config, edge).model_copy(update={"seconds": 600.0})
    assert text.startswith("# What this edge does")
    assert '\ntasks = ["federated", "importance"]\n' in text
    assert '\n# bytes = "1 GB"\n' in text
    assert all(f"{key} = " in text for key in EdgePolicy.model_fields)


def test_without_a_file_or_a_key_run_toml_alone_is_the_limit(tmp_path: Path) -> None:
    assert read_policy(tmp_path / POLICY_FILE) == EdgePolicy()
    assert read_text(tmp_path, "") == EdgePolicy()
    assert read_text(tmp_path, "[edge-policy]\nseconds = '90 s'\nbytes = '2 MB'\n") == EdgePolicy(seconds=90, bytes=2_000_000)


def refusals(folder: Path, text: str) -> list[AtollError]:
    with pytest.raises(InputError) as caught:
        read_text(folder, text)
    return list(caught.value.errors) if isinstance(caught.value, ManyErrors) else [caught.value]


def test_every_wrong_key_is_told_at_once_with_line_and_nearest_name(tmp_path: Path) -> None:
    text = '[edge-policy]\nstep = 5\nrank = 0\nbits = [4, 5, 6]\ntasks = ["federatd"]\nseconds = "soon"\n[edge_policy]\nx = 1\n'
    found = refusals(tmp_path, text)
    assert sorted(error.code for error in found) == ["C102", "C102", "C103", "C103", "C103", "C103"]
    pages = {error.where.rpartition(": ")[2]: error for error in found}
    assert "line 2" in pages["edge-policy.step"].where
    assert pages["edge-policy.step"].do == "did you mean steps?"
    assert pages["edge-policy.rank"].expected == "a whole number, 1 or more"
    assert "one of 4, 8, 16, 32" in pages["edge-policy.bits"].expected
    assert pages["edge_policy"].do == "did you mean [edge-policy]?"
    assert all(error.do for error in found)


@pytest.mark.parametrize("text", ["steps = 5\n", "edge-policy = 5\n", "[edge-policy\n", "[[edge-policy]]\nsteps = 5\n"])
def test_a_file_of_another_form_is_an_error_page(tmp_path: Path, text: str) -> None:
    assert all(error.exit_status == 2 for error in refusals(tmp_path, text))
