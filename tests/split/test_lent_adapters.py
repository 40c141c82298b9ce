"""Adapters that are lent to the host for a step train as they do beside the whole base: to the same bits, in fp32 and on one thread."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.adapters.attach import attached
from atoll.adapters.state import AdapterState
from atoll.base.head import token_losses_N
from atoll.base.load import Base, load_base
from atoll.config.schema import Train
from atoll.errors import ProtocolError
from atoll.selection.schedule import Schedule
from atoll.split.cut import Cut
from atoll.split.device import exchange
from atoll.split.device.client import Client
from atoll.split.host.blocks.lent import LentAdapters
from atoll.split.randomness import Draws
from atoll.training.importance_warmup import WarmUp, warm_up
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState, Update
from atoll.wire.encoding import decode, encode, error_bound

from tests.conftest import random_model, save_model_folder
from tests.pieces import HOW_KILLED, Steps, adapters, selector, stream
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

STEPS = 2
CUTS = {"0-0": Cut(0, 0), "1-0": Cut(1, 0), "1-1": Cut(1, 1)}


@dataclass(frozen=True)
class Case:
    accumulate: int = 1
    dropout: float = 0.0
    checkpointing: bool = False
    recomputes: bool = False


ALL = [Case(*values) for values in itertools.product((1, 4), (0.0, 0.2), (False, True), (False, True))]
FEW = (Case(4, 0.2), Case(1, 0.2, checkpointing=True, recomputes=True))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def local(family: str, start: AdapterState, case: Case, batching: str = "bucket") -> Update:
    base = Base(family, random_model(family, BLOCKS), None, family == "gpt2")  # type: ignore[arg-type]
    trainer = LocalTrainer(base, Train(learning_rate=2e-3), STEPS, case.dropout, 0, "north")
    plan = FitPlan(STEPS, case.accumulate, case.checkpointing)
    return trainer.fit(TrainState(start, {}, 0), stream(batching=batching), plan, Steps([]))


def same(a: Update, b: Update) -> bool:
    moments = all(torch.equal(a.state.optimizer[name].first, b.state.optimizer[name].first) for name in a.state.optimizer)
    return a.state.adapter.digest() == b.state.adapter.digest() and moments and [r.loss for r in a.reports] == [r.loss for r in b.reports]


def lent(family: str, start: AdapterState, cut: Cut, case: Case, batching: str = "bucket", **terms: Any) -> tuple[Update, Client]:
    host = thread_host(served(random_model(family, BLOCKS), recomputes=case.recomputes))
    trainer, client = device_trainer(
        family, cut, host, kind=start.kind, mode="lent", dropout=case.dropout, total_steps=STEPS, **terms
    )
    plan = FitPlan(STEPS, case.accumulate, case.checkpointing)
    return trainer.fit(TrainState(start, {}, 0), stream(batching=batching), plan, Steps([])), client


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("cut", CUTS)
def test_lent_is_local_to_the_bit(family: str, cut: str, kind: str, case: Case) -> None:
    start = adapters(random_model(family, BLOCKS), kind)
    update, _ = lent(family, start, CUTS[cut], case)
    assert same(update, local(family, start, case))


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_however_a_step_is_made(case: Case, batching: str) -> None:
    start = adapters(random_model("llama", BLOCKS))
    update, _ = lent("llama", start, CUTS["1-1"], case, batching)
    assert same(update, local("llama", start, case, batching))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(("kind", "killed"), HOW_KILLED)
def test_killed_modules_beside_lent_ones(kind: str, killed: str, recomputes: bool) -> None:
    """Sent once a session, and evaluated, left out or merged there as they are beside the whole base."""
    start, plan = adapters(random_model("llama", BLOCKS), kind), FitPlan(12, 2, False)
    schedule = Schedule(2, 6, ever=True)
    choosing = selector(start, schedule, front=1, policy="kill-and-revive", keep=0.2, killed=killed, variation="change")
    base = Base("llama", random_model("llama", BLOCKS), None, False)  # type: ignore[arg-type]
    whole = LocalTrainer(base, Train(learning_rate=2e-3), 12, 0.2, 0, "north", selector=choosing)
    wanted = whole.fit(TrainState(start, {}, 0), stream(), plan, Steps([]))
    host = thread_host(served(random_model("llama", BLOCKS), recomputes=recomputes))
    trainer, client = device_trainer("llama", Cut(1, 0), host, kind=kind, mode="lent", dropout=0.2, total_steps=12)
    update = replace(trainer, selector=choosing).fit(TrainState(start, {}, 0), stream(), plan, Steps([]))
    assert same(update, wanted)
    assert len({report.active for report in update.reports}) > 2
    assert (client.account.sent["killed"] > 0) == (killed != "skip")


@pytest.mark.parametrize("bits", [8, 4])
def test_beside_quantized_modules(bits: int, tmp_path: Path) -> None:
    save_model_folder(tmp_path, "llama")
    start, plan = adapters(random_model("llama")), FitPlan(STEPS, 2, False)
    whole = LocalTrainer(load_base(str(tmp_path), bits=bits), Train(learning_rate=2e-3), STEPS, 0.1, 0, "north")
    wanted = whole.fit(TrainState(start, {}, 0), stream(), plan, Steps([]))
    host = thread_host(served(load_base(str(tmp_path), bits=bits).model))
    trainer, _ = device_trainer(load_base(str(tmp_path)).model, Cut(0, 0), host, mode="lent", dropout=0.1, total_steps=STEPS)
    assert same(trainer.fit(TrainState(start, {}, 0), stream(), plan, Steps([])), wanted)


def test_the_warm_up_scores_alike() -> None:
    model = random_model("llama", BLOCKS)
    sizes = {name: (adapter.down_RI.shape[1], adapter.up_OR.shape[0]) for name, adapter in adapters(model).modules.items()}
    settings = WarmUp("svd-sensitivity", 3, 2, 4.0, Train(learning_rate=1e-2), 0, "north")
    wanted = warm_up(Base("llama", model, None, False), sizes, stream(), settings)  # type: ignore[arg-type]
    trainer, _ = device_trainer("llama", Cut(1, 0), thread_host(served(random_model("llama", BLOCKS))), mode="lent")
    got = warm_up(trainer.base, sizes, stream(), settings)
    assert got.scores == wanted.scores
    assert any(score > 0 for score in got.scores.values())


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_adapters_in_fewer_bits_are_off_by_no_more_than_their_codec_says(codec: str) -> None:
    """Of one step by plain descent: the factors and then their gradients are rounded once, and nothing else is."""
    start = adapters(random_model("llama", BLOCKS))
    sent: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    real = exchange.Session.new_factors

    def told(session: exchange.Session, factors: list[torch.Tensor]) -> list[torch.Tensor]:
        found = real(session, factors)
        sent["factors"] = [(one, decode(encode(one, session.adapter_codec))) for one in found]
        return found

    exact, _ = lent("llama", start, Cut(1, 0), Case())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.Session, "new_factors", told)
        rounded, client = lent("llama", start, Cut(1, 0), Case(), adapter_codec=codec)
    for before, after in sent["factors"]:
        assert ((after - before).abs().amax(-1) <= error_bound(before, codec)).all()
    digits = 2.0**-11 if codec == "fp16" else 2.0**-8
    first = [update.reports[0].grad_norm for update in (exact, rounded)]
    assert first[0] != first[1]
    assert first[1] == pytest.approx(first[0], rel=20 * digits)
    plain, small = (client.account.sent["forward"] for _, client in (lent("llama", start, Cut(1, 0), Case()), (None, client)))
    assert small < plain


def test_after_a_step_the_host_holds_no_adapter() -> None:
    host, held = served(random_model("llama", BLOCKS)), []
    real = LentAdapters.give_back

    def seen(adapters: LentAdapters) -> list[torch.Tensor]:
        grads = real(adapters)
        held.append(sum(layer.down_RI.numel() + layer.up_OR.numel() for layer in adapters.pairs.values()))
        assert all(layer.down_RI.grad is None and layer.up_OR.grad is None for layer in adapters.pairs.values())
        return grads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LentAdapters, "give_back", seen)
        trainer, client = device_trainer("llama", Cut(1, 0), thread_host(host), mode="lent", total_steps=STEPS)
        trainer.fit(TrainState(adapters(random_model("llama", BLOCKS)), {}, 0), stream(), FitPlan(STEPS, 3, False), Steps([]))
    assert held == [0] * STEPS
    assert client.account.sent["hidden_gradient"] > 0


def test_adapters_travel_once_a_step_and_once_for_many_evaluations() -> None:
    start = adapters(random_model("llama", BLOCKS))
    _, once = lent("llama", start, Cut(0, 0), Case(accumulate=1))
    _, four = lent("llama", start, Cut(0, 0), Case(accumulate=4))
    assert four.account.received["finished"] < 1.1 * once.account.received["finished"]
    trainer, client = device_trainer("llama", Cut(1, 0), thread_host(served(random_model("llama", BLOCKS))), mode="lent")
    sizes = []
    with attached(trainer.base.model, start):
        for _ in range(3):
            before = client.account.sent["forward"]
            token_losses_N(trainer.base.model, stream().batch(0))
            sizes.append(client.account.sent["forward"] - before)
    assert sizes[1] == sizes[2] < sizes[0]


@pytest.mark.parametrize("state", [b"no state", b"\0" * 5056], ids=["short", "of zeros"])
def test_what_is_no_state_of_a_generator_ends_the_session(state: bytes) -> None:
    """A short one is taken for a seed, as from another kind of processor; one of the right size that cannot be is refused."""
    before = torch.get_rng_state()
    if len(state) < 100:
        with (draws := Draws(torch.device("cpu"), state)):
            first = torch.rand(3)
        with Draws(torch.device("cpu"), state):
            assert torch.equal(torch.rand(3), first)
        assert draws.state == state
    else:
        with pytest.raises(ProtocolError, match="random generator"), Draws(torch.device("cpu"), state):
            pass
    assert torch.equal(torch.get_rng_state(), before)
