"""Lent adapters of several devices in one pass through the shared weights, each row with its own, against a pass for each device.

What a host could do with requests that wait: forward and backward through all blocks, as one batch or taking turns, in one process and
without a network. Pairs, one after the other; ratios of medians. Rows of one length, so that nothing is padded.

Usage: python benchmarks/one_pass.py [--models 15M 100M SmolLM2-135M] [--devices 8] [--tokens 48 512] [--threads 1 2] [--repeats 7]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.adapters.layers import LowRankPair, adapted
from atoll.base.load import load_base
from sides import results, task
from sides.options import Options

RANK, SCALING = 8, 2.0
TARGETS = ("q_proj", "k_proj", "v_proj")
Pairs = Sequence[tuple[nn.Parameter, nn.Parameter]]


class RowsOwn(nn.Module):
    """y = base(x) + s B_row A_row x: every row has a pair of its own."""

    def __init__(self, base: nn.Module, pairs: Pairs) -> None:
        super().__init__()
        self.base, self.pairs = base, pairs

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Shapes: (B, T, inputs) to (B, T, outputs)."""
        down_BIR = torch.stack([down_RI.T for down_RI, _ in self.pairs])
        up_BRO = torch.stack([up_OR.T for _, up_OR in self.pairs])
        y: Tensor = self.base(x_BTI)
        return y + torch.bmm(torch.bmm(x_BTI, down_BIR), up_BRO) * SCALING


def measure(model: PreTrainedModel, num_devices: int, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of either way, and how far their gradients are apart."""
    torch.manual_seed(0)
    names = [name for name, _ in model.named_modules() if name.endswith(TARGETS)]
    bases = {name: model.get_submodule(name) for name in names}
    pairs = {name: [_pair(bases[name]) for _ in range(num_devices)] for name in names}
    body, width = model.get_decoder(), model.config.hidden_size
    h_BTD, g_BTD = torch.randn(2, num_devices, tokens, width)

    def turns() -> None:
        for row in range(num_devices):
            for name in names:
                down_RI, up_OR = pairs[name][row]
                model.set_submodule(name, adapted(bases[name], LowRankPair("lora", down_RI, up_OR, SCALING, 0.0)))
            body(inputs_embeds=h_BTD[row : row + 1], use_cache=False).last_hidden_state.backward(g_BTD[row : row + 1])

    def together() -> None:
        for name in names:
            model.set_submodule(name, RowsOwn(bases[name], pairs[name]))
        body(inputs_embeds=h_BTD, use_cache=False).last_hidden_state.backward(g_BTD)

    def seconds(way: object) -> tuple[float, list[Tensor]]:
        leaves = [matrix for each in pairs.values() for pair in each for matrix in pair]
        for leaf in leaves:
            leaf.grad = None
        begun = time.perf_counter()
        way()  # type: ignore[operator]
        return time.perf_counter() - begun, [leaf.grad for leaf in leaves if leaf.grad is not None]

    (_, alone), (_, joined) = seconds(turns), seconds(together)
    apart = max(float((a - b).norm() / a.norm()) for a, b in zip(alone, joined, strict=True))
    times = [(seconds(turns)[0], seconds(together)[0]) for _ in range(repeats)]
    for name, base in bases.items():
        model.set_submodule(name, base)
    of_turns, of_one_pass = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(one / many for many, one in times)
    return {"turns_seconds": of_turns, "one_pass_seconds": of_one_pass, "one_pass_to_turns": ratio, "largest_difference": apart}


def _pair(base: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    num_outputs, num_inputs = base.weight.shape  # type: ignore[misc]
    return nn.Parameter(torch.randn(RANK, num_inputs) * 0.02), nn.Parameter(torch.randn(num_outputs, RANK) * 0.02)


def main() -> None:
    """Measure and write."""
    options = Options(__doc__)
    options.size("--models", ["15M", "100M"], [task.TINY])
    options.size("--devices", 8, 2)
    options.size("--tokens", [48, 512], [8], help="of each device")
    options.size("--threads", [1, 2], [1])
    options.size("--repeats", 7, 1)
    given = options.parse()
    found: dict[str, dict[str, float]] = {}
    for name in given.models:
        with tempfile.TemporaryDirectory() as temporary:
            model = load_base(str(task.model_folder(name, Path(temporary)))).model
        for threads, tokens in itertools.product(given.threads, given.tokens):
            torch.set_num_threads(threads)
            row = measure(model, given.devices, tokens, given.repeats)
            found[f"{name}, {threads} threads, {given.devices} x {tokens}"] = row
            print(f"{name:14} {threads} threads {given.devices} x {tokens:4}", " ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    results.write(given.out, "one_pass", {"rank": RANK, "targets": TARGETS, "repeats": given.repeats}, found)


if __name__ == "__main__":
    main()
