"""Small pieces of a run, without files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.places import module_size
from atoll.adapters.state import AdapterState
from atoll.base.load import Base
from atoll.base.part import part_files
from atoll.config.schema import Select, Train, Wire
from atoll.selection.pool import PoolModule
from atoll.selection.schedule import Schedule
from atoll.selection.selector import ModuleSelector
from atoll.shapes import ModuleKind, ModuleShape
from atoll.tasks.batches import BatchStream
from atoll.tasks.tokens import Example, Examples
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import StepReport
from atoll.wire.handshake import block_of

from tests.conftest import random_model


def examples(num_rows: int = 12, seed: int = 0) -> Examples:
    """Rows of 5 to 14 tokens; the later half of each carries loss."""
    random = np.random.default_rng(seed)
    items = []
    for _ in range(num_rows):
        length = int(random.integers(5, 15))
        items.append(Example(random.integers(3, 96, length, dtype=np.int32), np.arange(length) >= length // 2))
    return Examples(tuple(items), np.arange(num_rows), np.zeros(num_rows, dtype=bool), 0, 64)


def stream(edge: str = "north", batch_size: int = 4, seed: int = 0, batching: str = "bucket") -> BatchStream:
    """Micro-batches of `examples`."""
    return BatchStream(examples(seed=seed), batch_size=batch_size, seed=0, edge=edge, batching=batching, pad_id=0)  # type: ignore[arg-type]


def adapters(model: PreTrainedModel, kind: str = "lora", rank: int = 4) -> AdapterState:
    """Fresh adapters on every projection."""
    modules = {n: m for n, m in model.named_modules() if module_size(m) and m is not model.get_output_embeddings()}
    sizes = {n: module_size(m) or (0, 0) for n, m in modules.items()}
    return fresh_adapters(kind, sizes, dict.fromkeys(sizes, rank), alpha=8, seed=0)  # type: ignore[arg-type]


def trainer(family: str = "llama", dropout: float = 0.0, total_steps: int = 6, edge: str = "north", **train: object) -> LocalTrainer:
    """A local trainer on a tiny random model."""
    base = Base(family, random_model(family), None, family == "gpt2")  # type: ignore[arg-type]
    return LocalTrainer(base, Train(learning_rate=1e-2, **train), total_steps, dropout, 0, edge)  # type: ignore[arg-type]


def write_part(source: str, front: int, back: int, folder: Path) -> None:
    """The files of a device's part of a base, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in part_files(source, front, back):
        (folder / file.name).write_bytes(b"".join(file.pieces()))
        assert (folder / file.name).stat().st_size == file.num_bytes


@dataclass
class Steps:
    """Collects reports."""

    reports: list[StepReport]

    def __call__(self, report: StepReport) -> None:
        self.reports.append(report)


HOW_KILLED = [("lora", "offload"), ("lora", "skip"), ("lora", "merge"), ("bottleneck", "offload"), ("bottleneck", "skip")]
"""Every kind of adapter, killed in every way it can be."""


def selector(state: AdapterState, schedule: Schedule, *, front: int = 0, **select: object) -> ModuleSelector:
    """A selector over all modules of the adapters."""
    kinds: dict[str, ModuleKind] = {name: "attention" if "attn" in name else "mlp" for name in state.modules}
    shapes = [ModuleShape(name, *one.size, kinds[name], block_of(name) or 0) for name, one in state.modules.items()]
    pool = [
        PoolModule(m.name, (m.block, m.stage), (m.d_in, m.d_out, state.modules[m.name].rank), m.block >= front, m.block < front)
        for m in sorted(shapes, key=lambda m: (m.block, m.stage))
    ]
    return ModuleSelector(Select(**select), tuple(pool), schedule, 0, 32, Wire(), keeps_back=False)  # type: ignore[arg-type]
