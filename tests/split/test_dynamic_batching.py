"""Lent micro-batches that wait go through the base together: near what each gets alone, and nobody's fault is another's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from atoll.selection.schedule import Schedule
from atoll.split.cut import Cut
from atoll.split.host.blocks.batching import Batcher, Job
from atoll.split.host.blocks.middle import Middle
from atoll.split.host.compute_queue import ComputeQueue
from atoll.split.host.fair_share import FairShare
from atoll.split.host.session import Served
from atoll.training.trainer import FitPlan, TrainState, Update

from tests.conftest import random_model
from tests.pieces import HOW_KILLED, Steps, adapters, selector, stream
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host
from tests.split.running import wait_until
from tests.split.test_split_equals_local import difference

STEPS = 3
PLAN = FitPlan(STEPS, 2, False)


class Counting(Batcher):
    """Tells how many were computed together each time, and begins none before `wait_for` have come."""

    wait_for = 1
    sizes: list[int]

    def run(self, job: Job) -> bool:
        if not job.is_taken:
            with job.turns.release():
                wait_until(lambda: job.is_taken or len(self._waiting) >= self.wait_for)
        return super().run(job)

    def _lead(self, leader: Job, jobs: Sequence[Job]) -> None:
        self.sizes.append(len(jobs))
        super()._lead(leader, jobs)


def batching(family: str, wait_for: int, middle: type[Middle] = Middle) -> tuple[Served, Counting]:
    model = random_model(family, BLOCKS)
    host = served(model, recomputes=True)
    # Found by passes through the model, which others would see.
    facts = {cut: host.facts(cut) for cut in (Cut(0, 0), Cut(1, 0), Cut(1, 1))}

    def new_middle(cut: Cut, pause: Callable[[], None]) -> Middle:
        return middle(model, cut, (), returns_tuple=host.trace.returns_tuple, factored=False, peer=None, pause=pause)

    batcher = Counting(new_middle, 4096)
    batcher.wait_for, batcher.sizes = wait_for, []
    return replace(host, batcher=batcher, facts=facts.__getitem__), batcher


def trained(host: Served, family: str, seeds: Sequence[int], cut: Cut, kind: str = "lora", **trainer_options: object) -> list[Update]:
    """What so many devices come to at the same time, each with rows of its own."""
    updates: dict[int, Update] = {}
    # One after the other: random weights are drawn from the process's own generator.
    devices = {seed: device_trainer(family, cut, thread_host(host), kind=kind, mode="lent", total_steps=STEPS) for seed in seeds}
    starts = {seed: adapters(random_model(family, BLOCKS), kind, rank=2 + seed) for seed in seeds}

    def work(seed: int) -> None:
        trainer, client = devices[seed]
        trainer = replace(trainer, **trainer_options)  # type: ignore[arg-type]
        updates[seed] = trainer.fit(TrainState(starts[seed], {}, 0), stream(seed=seed, batch_size=2 + seed), PLAN, Steps([]))
        client.end()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [updates[seed] for seed in seeds]


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("cut", [Cut(0, 0), Cut(1, 0), Cut(1, 1)], ids=str)
def test_together_is_near_alone(family: str, cut: Cut, kind: str) -> None:
    """Three devices with other ranks, rows and lengths than each other: every pass holds all three."""
    host, batcher = batching(family, 3)
    together = trained(host, family, (0, 1, 2), cut, kind)
    for seed, update in enumerate(together):
        (alone,) = trained(served(random_model(family, BLOCKS)), family, (seed,), cut, kind)
        assert difference(alone.state.adapter, update.state.adapter) < 1e-5
        assert [report.loss for report in update.reports] == pytest.approx([report.loss for report in alone.reports], rel=1e-5)
    assert batcher.sizes == [3] * (2 * 2 * STEPS)


@pytest.mark.parametrize(("kind", "killed"), HOW_KILLED)
def test_killed_modules_are_each_devices_own(kind: str, killed: str) -> None:
    start = adapters(random_model("llama", BLOCKS), kind, rank=2)
    choosing = selector(start, Schedule(1, None, ever=True), front=1, policy="early-kill", keep=0.3, killed=killed)
    host, batcher = batching("llama", 2 if killed != "merge" else 1)
    together = trained(host, "llama", (0, 1), Cut(1, 0), kind, selector=choosing)
    for seed, update in enumerate(together):
        (alone,) = trained(served(random_model("llama", BLOCKS)), "llama", (seed,), Cut(1, 0), kind, selector=choosing)
        assert difference(alone.state.adapter, update.state.adapter) < 1e-5
    assert set(batcher.sizes) <= {2}
    assert bool(batcher.sizes) or killed == "merge"


def test_who_comes_alone_has_the_same_bits() -> None:
    host, batcher = batching("llama", 1)
    (update,) = trained(host, "llama", (0,), Cut(1, 0))
    (alone,) = trained(served(random_model("llama", BLOCKS)), "llama", (0,), Cut(1, 0))
    assert update.state.adapter.digest() == alone.state.adapter.digest()
    assert batcher.sizes == []


class Breaking(Middle):
    """As if memory ended when most of the backward pass was done."""

    def backward(self, g_ND: torch.Tensor) -> torch.Tensor | None:
        super().backward(g_ND)
        raise torch.OutOfMemoryError("not for two")


def test_where_they_cannot_go_together_each_goes_alone() -> None:
    host, batcher = batching("llama", 2, Breaking)
    updates = trained(host, "llama", (0, 1), Cut(0, 0))
    assert 2 in batcher.sizes
    for seed, update in enumerate(updates):
        (alone,) = trained(served(random_model("llama", BLOCKS)), "llama", (seed,), Cut(0, 0))
        assert difference(alone.state.adapter, update.state.adapter) < 1e-5


def test_no_more_positions_than_the_host_takes() -> None:
    def job(rows: int, positions: int) -> Job:
        from atoll.remote_blocks import Layout
        from atoll.split.host.blocks.middle import Pass

        with ComputeQueue().session("") as turns:
            return Job(Cut(0, 0), torch.zeros(rows * positions, 8), Pass(Layout((positions,) * rows), positions, True, False), {}, turns)

    batcher = Batcher(lambda cut, pause: pytest.fail("nothing is computed"), 100)
    first, long, short, other = job(2, 20), job(1, 60), job(2, 10), replace(job(1, 10), cut=Cut(1, 0))
    for one in (first, long, short, other):
        batcher.add(one)
    assert batcher._take(first) == [first, short]
    assert batcher._waiting == [long, other]
    batcher.remove(long)
    assert batcher._waiting == [other]


def test_compute_is_charged_to_those_whose_rows_it_was() -> None:
    share = FairShare()
    for tenant in ("north", "south"):
        share.enter(tenant)
    share.arrive("north", 0.0)
    share.begin("north", 0.0)
    assert share.running("north", 4.0) == 4.0
    share.move("north", "south", 3.0)
    share.end("north", 4.0, within=True)
    assert {tenant: one.used for tenant, one in share._shares.items()} == {"north": 1.0, "south": 3.0}
