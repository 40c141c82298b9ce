"""Both ways to run a linear layer with a low-rank adapter, against the formula through plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from atoll.adapters.layers import LowRankPair, _is_small, adapted


@pytest.mark.parametrize(("num_inputs", "num_outputs", "small"), [(16, 24, True), (64, 172, True), (160, 200, False)])
@pytest.mark.parametrize("kind", ["linear", "linear with bias", "conv1d"])
@pytest.mark.parametrize("input_has_gradient", [True, False])
def test_values_and_gradients(num_inputs: int, num_outputs: int, small: bool, kind: str, input_has_gradient: bool) -> None:
    torch.manual_seed(0)
    base = Conv1D(num_outputs, num_inputs) if kind == "conv1d" else nn.Linear(num_inputs, num_outputs, bias=kind == "linear with bias")
    base.requires_grad_(False)
    down, up = nn.Parameter(torch.randn(4, num_inputs)), nn.Parameter(torch.randn(num_outputs, 4))
    layer = adapted(base, LowRankPair("lora", down, up, 0.5, 0.0))
    assert _is_small(layer.weight) == small
    x, g = torch.randn(2, 3, num_inputs, requires_grad=input_has_gradient), torch.randn(2, 3, num_outputs)
    wanted = [down, up, *([x] if input_has_gradient else [])]
    expected = base(x) + 0.5 * (x @ down.T @ up.T)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bf16_keeps_small_changes() -> None:
    assert not _is_small(torch.zeros(16, 16, dtype=torch.bfloat16)), "1 + 0.001 is 1 in bf16"
