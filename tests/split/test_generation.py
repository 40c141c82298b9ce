"""Generation with the middle blocks in a host: the tokens that the whole base writes, whether the host keeps keys and values or not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import prometheus_client
import pytest
import torch
from transformers import PreTrainedModel

from atoll.adapters.attach import attached
from atoll.adapters.state import AdapterState
from atoll.base.blocks import keeps_keys
from atoll.base.head import token_losses_N
from atoll.errors import BadValueError
from atoll.split.counted_stream import Transport
from atoll.split.cut import Cut
from atoll.split.device.client import Client
from atoll.split.host.blocks.kept import KeptRows, Shelf
from atoll.split.host.metrics import _Figures
from atoll.split.host.server import Host
from atoll.split.host.session import Served
from atoll.split.transport import ClientTransport, fetch_status
from atoll.tasks.scoring.generation import Sampling, generate_texts
from atoll.training.trainer import FitPlan, TrainState

from tests.conftest import random_model
from tests.families import build
from tests.pieces import Steps, adapters, stream
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host
from tests.split.running import PATIENCE_SECONDS, channel_to, llama_host, running, wait_until
from tests.split.test_faults import Breaking
from tests.tasks.letters import letters_tokenizer

NEW, PLENTY = 12, 2**24
CUTS = {"0-0": Cut(0, 0), "1-0": Cut(1, 0), "1-1": Cut(1, 1)}
PROMPTS = [[1, *range(10, 10 + length)] for length in (3, 9, 1, 5, 2)] + [[]]
SAMPLING = {"greedy": None, "drawn": Sampling(0.9, 0.8, 3)}


def trained(family: str, kind: str = "lora") -> AdapterState:
    """Adapters that change what is written."""
    fresh = adapters(random_model(family, BLOCKS), kind)
    torch.manual_seed(5)
    return replace(fresh, modules={
        name: replace(one, up_OR=torch.randn_like(one.up_OR) * 0.3) for name, one in fresh.modules.items()
    })  # fmt: skip


def write(model: PreTrainedModel, adapter: AdapterState, sampling: Sampling | None = None, batch_size: int = 4) -> list[str]:
    with attached(model, adapter):
        return generate_texts(model, letters_tokenizer(), PROMPTS, max_new_tokens=NEW, batch_size=batch_size, sampling=sampling)


def split(
    family: str, adapter: AdapterState, host: Callable[[], Transport], cut: Cut, sampling: Sampling | None = None, **terms: object
) -> tuple[list[str], Client]:  # fmt: skip
    trainer, client = device_trainer(family, cut, host, kind=adapter.kind, **terms)  # type: ignore[arg-type]
    return write(trainer.base.model, adapter, sampling), client


def host_of(family: str, cache_bytes: int = PLENTY) -> Served:
    return served(random_model(family, BLOCKS), cache_bytes=cache_bytes)


@pytest.mark.parametrize(
    ("cut", "how", "mode"), [("0-0", "greedy", "lent"), ("1-0", "drawn", "dense"), ("1-1", "drawn", "lent"), ("1-1", "greedy", "factored")]
)  # fmt: skip
def test_a_host_writes_what_the_whole_base_writes(family: str, cut: str, how: str, mode: str) -> None:
    adapter = trained(family)
    wanted = write(random_model(family, BLOCKS), adapter, SAMPLING[how])
    sent = []
    for cache_bytes in (0, PLENTY):
        texts, client = split(family, adapter, thread_host(host_of(family, cache_bytes)), CUTS[cut], SAMPLING[how], mode=mode)
        assert texts == wanted
        sent.append(client.account.sent.total())
    assert sent[1] < 0.6 * sent[0]
    assert len({len(text) for text in wanted}) > 1 or how == "greedy"


@pytest.mark.parametrize(
    ("name", "is_kept"), [("gemma3_text", True), ("mistral", True), ("gpt_neo", True), ("mpt", True), ("lfm2", False), ("mamba", False)]
)
def test_windows_are_kept_and_states_are_sent_whole(name: str, is_kept: bool) -> None:
    """Windows of 8, which rows outgrow; and what has no keys and values only."""

    def model() -> PreTrainedModel:
        return build(name).eval().requires_grad_(False)

    wanted = generate_texts(model(), letters_tokenizer(), PROMPTS, max_new_tokens=NEW, batch_size=4)
    trainer, client = device_trainer(model(), Cut(1, 0), thread_host(served(model(), cache_bytes=PLENTY)))
    assert generate_texts(trainer.base.model, letters_tokenizer(), PROMPTS, max_new_tokens=NEW, batch_size=4) == wanted
    assert keeps_keys(trainer.base.model) == keeps_keys(model()) == is_kept
    positions = sum(map(len, PROMPTS)) + NEW * len(PROMPTS)
    assert (client.account.sent["forward"] < 1.5 * positions * 32 * 4) == is_kept


@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
def test_what_was_driven_out_is_sent_again(mode: str) -> None:
    adapter, host = trained("llama"), host_of("llama")
    wanted, kept = split("llama", adapter, thread_host(host), Cut(1, 1), mode=mode)
    take, calls = Shelf.take, itertools.count()

    def forgetful(shelf: Shelf, place: Any) -> KeptRows | None:
        if next(calls) % 3 == 2:
            shelf.clear(place)
        return take(shelf, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shelf, "take", forgetful)
        texts, client = split("llama", adapter, thread_host(host), Cut(1, 1), mode=mode)
    assert texts == wanted
    assert client.account.sent.total() > kept.account.sent.total()


@pytest.mark.parametrize("after_reads", [2, 3, 7])
def test_after_a_lost_host_rows_are_sent_whole(after_reads: int) -> None:
    adapter, host = trained("llama"), host_of("llama")
    wanted, _ = split("llama", adapter, thread_host(host), Cut(1, 0), SAMPLING["drawn"], mode="lent")
    opened: list[Transport] = []

    def unlucky() -> Transport:
        opened.append(Breaking(thread_host(host)(), after_reads) if not opened else thread_host(host)())
        return opened[-1]

    texts, _ = split("llama", adapter, unlucky, Cut(1, 0), SAMPLING["drawn"], mode="lent", patience=30.0)
    assert texts == wanted
    assert len(opened) == 2


def test_what_is_kept_ends_with_training_and_with_the_session() -> None:
    host, adapter = host_of("llama"), trained("llama")
    trainer, client = device_trainer("llama", Cut(1, 0), thread_host(host), mode="lent")
    with attached(trainer.base.model, adapter):
        generate_texts(trainer.base.model, letters_tokenizer(), PROMPTS, max_new_tokens=2, batch_size=4)
        held = host.shelf.num_bytes
        token_losses_N(trainer.base.model, stream().batch(0))  # Evaluation takes nothing away.
        assert host.shelf.num_bytes == held > 0
        generate_texts(trainer.base.model, letters_tokenizer(), PROMPTS[:1], max_new_tokens=2, batch_size=4)
        assert 0 < host.shelf.num_bytes < held
        assert client.blocks is not None
        client.blocks.end()
        wait_until(lambda: host.shelf.num_bytes == 0)
        generate_texts(trainer.base.model, letters_tokenizer(), PROMPTS, max_new_tokens=2, batch_size=4)
    assert host.shelf.num_bytes == held
    trainer.fit(TrainState(adapter, {}, 0), stream(), FitPlan(1, 1, False), Steps([]))
    wait_until(lambda: host.shelf.num_bytes == 0)


def test_a_running_host_tells_what_it_keeps() -> None:
    host = replace(llama_host(), shelf=Shelf(PLENTY))
    with running(host) as serving, channel_to(serving) as channel:
        trainer, client = device_trainer("llama", Cut(1, 0), lambda: ClientTransport(channel, PATIENCE_SECONDS), mode="lent")
        assert fetch_status(channel, PATIENCE_SECONDS).cache_bytes == 0
        with attached(trainer.base.model, trained("llama")):
            generate_texts(trainer.base.model, letters_tokenizer(), [[1, 10, 11]], max_new_tokens=4, batch_size=1)
        status = fetch_status(channel, PATIENCE_SECONDS)
        # Keys and values of 2 heads of 8 at 3 + 3 positions, of 2 blocks; of the block in front marks that count.
        assert status.cache_bytes == 4 * 6 * (2 * 2 * 2 * 8 + 2) == status.open[0].cache_bytes
        assert status.max_cache_bytes == PLENTY
        page = prometheus_client.generate_latest(_registry(serving)).decode()
        assert f"atoll_host_cache_bytes {float(status.cache_bytes)}" in page
        assert client.blocks is not None
        client.blocks.end()
        wait_until(lambda: fetch_status(channel, PATIENCE_SECONDS).cache_bytes == 0)


def _registry(serving: Host) -> prometheus_client.CollectorRegistry:
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Figures(serving.account, serving.budgets, False))
    return registry


@dataclass
class Somebody:
    tenant: str = ""
    cache_bytes: int = 0


def rows_of(num_positions: int) -> KeptRows:
    """Of 64 bytes a position."""
    rows = KeptRows.of(random_model("llama"), 1)
    rows.cache.update(torch.zeros(1, 1, num_positions, 8), torch.zeros(1, 1, num_positions, 8), 0)
    return rows


def test_the_least_recently_used_go_first_and_nobody_has_more_than_half() -> None:
    holders = [Somebody() for _ in range(4)]
    shelf = Shelf(6 * 64)
    places = [shelf.open(holder) for holder in holders]
    assert [place.put(rows_of(2)) for place in places[:3]] == [True] * 3
    assert places[0].put(places[0].take() or rows_of(9))
    assert places[3].put(rows_of(3))  # The second and the third make room; the first was used after them.
    assert [holder.cache_bytes for holder in holders] == [128, 0, 0, 192]
    assert not places[3].put(rows_of(4))
    assert [holder.cache_bytes for holder in holders] == [128, 0, 0, 0]
    assert places[0].take() is not None  # What is in use stays, though it was used before the other.
    assert places[1].put(rows_of(3))
    assert places[2].put(rows_of(3))
    assert [holder.cache_bytes for holder in holders] == [128, 0, 192, 0]
    for place in places:
        place.close()
    assert shelf.num_bytes == 0
    assert not Shelf(0).open(Somebody()).put(rows_of(1))


def test_a_tenant_of_many_sessions_drives_out_its_own() -> None:
    shelf, quiet = Shelf(8 * 64), Somebody("quiet")
    assert shelf.open(quiet).put(rows_of(2))
    loud = [Somebody("loud") for _ in range(5)]
    assert all(shelf.open(one).put(rows_of(2)) for one in loud)
    assert quiet.cache_bytes == 128
    assert [one.cache_bytes for one in loud] == [0, 0, 128, 128, 128]


def test_what_is_drawn_is_the_seeds_and_leaves_torch_as_it_was() -> None:
    model, adapter = random_model("llama", BLOCKS), trained("llama")
    before = torch.get_rng_state()
    drawn = {seed: write(model, adapter, Sampling(1.2, 1.0, seed)) for seed in (0, 1)}
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] != drawn[1]
    assert write(model, adapter, Sampling(1.2, 1.0, 0)) == drawn[0]
    greedy = write(model, adapter)
    assert write(model, adapter, Sampling(1.0, 1e-6, 0)) == greedy != drawn[0]
    assert write(model, adapter, Sampling.asked(0.0, 0.5, 7)) == greedy


@pytest.mark.parametrize(
    ("given", "wanted"),
    [((None, None, None), None), ((0.0, 0.5, 3), None), ((0.7, None, None), (0.7, 1.0, 0)), ((None, 0.9, None), (1.0, 0.9, 0)),
     ((None, None, 4), (1.0, 1.0, 4))],
)  # fmt: skip
def test_what_is_asked_for(given: Any, wanted: Any) -> None:
    assert Sampling.asked(*given) == (None if wanted is None else Sampling(*wanted))


@pytest.mark.parametrize("given", [(-1.0, None, None), (float("nan"), 1.0, 1), (float("inf"), None, None), (1.0, 0.0, 0), (1.0, 1.1, 0),
                                   (1.0, float("nan"), 0), (1.0, 1.0, -1), (1.0, 1.0, 2**63)])  # fmt: skip
def test_what_cannot_be_drawn_by(given: Any) -> None:
    with pytest.raises(BadValueError, match="cannot be drawn"):
        Sampling.asked(*given)


@pytest.mark.parametrize(("asked", "said"), [
    ((None, 0.0, None), ("--top-p", "more than 0")), ((math.nan, None, None), ("--temperature", "finite")),
    ((-1.0, None, 1), ("--temperature", "0 or more")), ((None, 1.5, None), ("--top-p", "1")),
])  # fmt: skip
def test_what_cannot_be_drawn_by_is_named(asked: tuple[float | None, float | None, int | None], said: tuple[str, str]) -> None:
    with pytest.raises(BadValueError) as caught:
        Sampling.asked(*asked)
    assert all(word in caught.value.page() for word in said)
