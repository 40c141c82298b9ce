"""The memory of a training step at the size of real bases, without their weights or an accelerator, beside what is planned for one.

torch's fake tensors have shapes and no numbers. The real step runs on them, and the storages that are alive at once are counted: what an
accelerator's allocator would be asked for, without what it keeps aside. Two and three blocks of a base are run; the rest is a line.

Usage: python benchmarks/alive_memory.py [--bases llama3-8b qwen3-4b] [--rows 8] [--tokens 1024]
"""

from __future__ import annotations

import copy
import gc
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, masking_utils

from atoll.adapters.fresh import fresh_adapters
from atoll.base.load import Base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Train
from atoll.planner.feasibility import Setting
from atoll.shapes import BaseShapes
from atoll.tasks.batches import Batch
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState
from sides import big_bases, child, results
from sides.options import Options

RANK = 16
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the largest sum of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in pytree.tree_leaves(out):
            if isinstance(one, Tensor):
                self._see(one.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def measure(name: str, precision: str, again: bool, rows: int, tokens: int) -> dict[str, float]:
    """Bytes alive at the peak of a step, and what is planned."""
    _make_fakeable()
    with tempfile.TemporaryDirectory() as folder:
        config = big_bases.write(name, Path(folder))
        shapes = read_shapes(folder)
    dtype = PRECISIONS[precision]
    two, three = (_step(config, shapes, dtype, again, rows, tokens, blocks) for blocks in (2, 3))
    alive = two + (three - two) * (shapes.num_blocks - 2)
    ranks = {module.name: RANK for module in shapes.modules}
    planned = Setting(shapes, ranks, 8 * dtype.itemsize, rows, tokens, again, process_bytes=0, holds_all=False).peak_bytes
    return {"alive_bytes": alive, "planned_bytes": planned, "ratio": planned / alive}


def _step(config: PretrainedConfig, shapes: BaseShapes, dtype: torch.dtype, again: bool, rows: int, tokens: int, blocks: int) -> int:
    config = copy.deepcopy(config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules if module.block < blocks}
    with FakeTensorMode(), Alive() as alive:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        ids_BT, at_N = torch.zeros(rows, tokens, dtype=torch.int64), torch.zeros(rows * (tokens - 1), dtype=torch.int64)

        class Same:
            def batch(self, step: int) -> Batch:
                return Batch(ids_BT, at_N, at_N, None, None, (tokens,) * rows)

        gc.collect()
        base_bytes = alive.now
        # From step 1 on, as an edge's first step counts its FLOPs. What the state holds lies in the machine's memory.
        state = TrainState(fresh_adapters("lora", sizes, dict.fromkeys(sizes, RANK), 16.0, 0), {}, 1)
        gc.collect()
        before = alive.now
        alive.peak = before
        base = Base("fake", model, None, False)  # type: ignore[arg-type]
        LocalTrainer(base, Train(schedule="constant"), 9, 0.0, 0, "edge").fit(state, Same(), FitPlan(1, 1, again), lambda report: None)
        return base_bytes + alive.peak - before


def _make_fakeable() -> None:
    """Fake tensors have no numbers to look at, and an accelerator's fused attention is to be counted, not the CPU's."""

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return found

    torch.Tensor.item = lambda self: 1.0  # type: ignore[method-assign]
    nn.functional.scaled_dot_product_attention = fused
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # It looks at numbers to find that nothing is packed.


def main() -> None:
    """Every base in both precisions, with and without checkpointing, each in a process of its own."""
    options = Options(__doc__)
    options.size("--bases", ["llama3-8b", "qwen3-4b"], ["small"], choices=tuple(big_bases.BASES))
    options.size("--rows", 8, 2)
    options.size("--tokens", 1024, 32)
    given = options.parse()
    found: dict[str, Any] = {}
    for name in given.bases:
        for precision in PRECISIONS if not given.quick else ("bf16",):
            for again in (False, True):
                case = f"{name} {precision}{', checkpointing' if again else ''}"
                found[case] = child.figures(__file__, name, precision, again, given.rows, given.tokens)
                one = found[case]
                print(f"{case}: {one['alive_bytes'] / 1e9:.2f} GB alive, {one['planned_bytes'] / 1e9:.2f} planned, {one['ratio']:.2f}")
    results.write(given.out, "alive_memory", {"rows": given.rows, "tokens": given.tokens, "rank": RANK}, found)


if __name__ == "__main__":
    child.run(main, measure)
