"""Meters read what really happened."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from atoll.cost import meters
from atoll.cost.formulas import Flops
from atoll.cost.meters import CountedFlops, CountedStep, FirstStep, PeakMemory, resident_bytes, resident_peak_bytes

BLOCK_BYTES = 64 * 2**20


def test_the_peak_sees_a_block_that_is_gone_again() -> None:
    with PeakMemory() as without:
        pass
    with PeakMemory() as peak:
        torch.ones(BLOCK_BYTES // 4)
    assert peak.num_bytes - without.num_bytes >= 0.8 * BLOCK_BYTES


def test_what_is_held_now_comes_and_goes() -> None:
    before = resident_bytes()
    block = torch.ones(BLOCK_BYTES // 4)
    held = resident_bytes()
    del block
    assert held - before >= 0.8 * BLOCK_BYTES
    assert held - resident_bytes() >= 0.8 * BLOCK_BYTES


def test_the_peak_is_set_back() -> None:
    torch.ones(4 * BLOCK_BYTES // 4)
    before = resident_peak_bytes()
    with PeakMemory() as peak:
        pass
    assert peak.num_bytes <= before - BLOCK_BYTES or not os.access(meters._CLEAR_REFS, os.W_OK)


def test_a_kernel_that_refuses_leaves_the_peak_since_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meters, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    monkeypatch.setattr(meters, "_STATUS", tmp_path / "absent" / "status")
    with PeakMemory() as peak:
        pass
    assert peak.num_bytes > 10 * 2**20


N, D, V = 5, 8, 96
PRODUCT = 2 * N * D * V


def counted(work: object, head: Tensor) -> CountedFlops:
    with CountedFlops(head) as count:
        work()  # type: ignore[operator]
    return count


def test_a_head_is_counted_apart_also_where_it_is_the_embedding() -> None:
    """Forward and backward through an embedding, a projection of the head's size, and the head, whose weight is the embedding's."""
    embedding, other = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    head = embedding.weight.requires_grad_(False)

    def work() -> None:
        x = embedding(torch.arange(N)).requires_grad_(True)
        (other(x).sum() + nn.functional.linear(x, head).sum()).backward()

    count = counted(work, head)
    assert (count.head_flops, count.flops) == (2 * PRODUCT, 5 * PRODUCT), "the other's weight has a gradient, too"


@pytest.mark.parametrize("product", [
    lambda x, w, z: x @ w.T,
    lambda x, w, z: torch.mm(x, w.T, out=z),
    lambda x, w, z: torch.addmm(z, x, w.T),
    lambda x, w, z: z.addmm_(x, w.T),
    lambda x, w, z: nn.functional.linear(x[None], w, z[0]),
    lambda x, w, z: torch.bmm(x[None], w.T[None]),
    lambda x, w, z: z[None].baddbmm_(x[None], w.T[None]),
])  # fmt: skip
def test_every_form_of_a_product_is_counted(product: object) -> None:
    x, w, z = torch.ones(N, D), torch.ones(V, D), torch.ones(N, V)
    count = counted(lambda: product(x, w, z), w)  # type: ignore[operator]
    assert (count.head_flops, count.flops) == (PRODUCT, PRODUCT)
    assert counted(lambda: product(x, w, z), torch.ones(V, D)).head_flops == 0  # type: ignore[operator]


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_counted_as_pytorch_counts_it_on_other_devices(causal: bool) -> None:
    q, k, v = (torch.randn(2, 4, length, 8, requires_grad=True) for length in (12, 16, 16))
    head = torch.ones(1)
    forward = counted(lambda: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal), head)
    both = counted(lambda: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward(), head)
    assert forward.flops == sdpa_flop_count(q.shape, k.shape, v.shape)
    assert both.flops - forward.flops == sdpa_backward_flop_count(q.shape, q.shape, k.shape, v.shape)


def test_work_of_other_threads_and_after_the_end_is_not_counted() -> None:
    x, w = torch.ones(N, D), torch.ones(V, D)

    def remote_blocks() -> None:
        thread = threading.Thread(target=lambda: x @ w.T)
        thread.start()
        thread.join()

    count = counted(remote_blocks, w)
    _ = x @ w.T
    assert count.flops == 0


def test_what_fails_inside_ends_the_counting() -> None:
    x, w = torch.ones(N, D), torch.ones(V, D)
    count = CountedFlops(w)
    with pytest.raises(RuntimeError), count:
        _ = x @ w
    _ = x @ w.T
    assert count.flops == 0
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.autograd.is_multithreading_enabled()


def test_the_first_step_is_read_back() -> None:
    first = FirstStep(CountedStep(10**12, 3), Flops(1, 2, 3))
    assert FirstStep.from_numbers(first.to_numbers()) == first
    with pytest.raises(KeyError):
        FirstStep.from_numbers({})
