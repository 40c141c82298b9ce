"""Foretold and measured peak memory of local training, side by side; every measurement in a process of its own.

Usage: python benchmarks/memory.py [MODEL_FOLDER ...]      (default: the built-in base and two random ones)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from atoll import embedded
from atoll.base.read_shapes import read_shapes
from atoll.cost.memory import training_memory
from atoll.units import format_bytes

if TYPE_CHECKING:
    from atoll.tasks.batches import Batch

STEPS = 4
CASES = [(8, 128, False), (8, 128, True), (32, 128, False), (8, 512, False), (16, 512, True)]
"""Rows, tokens a row, gradient checkpointing."""
RANDOM = {
    "random llama, 15 M, vocabulary 32,000": ("llama", {
        "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 32000,
        "max_position_embeddings": 1024, "tie_word_embeddings": True,
    }),
    "random llama, 60 M": ("llama", {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 8192, "max_position_embeddings": 1024,
    }),
    "random gpt2, 30 M": ("gpt2", {"n_embd": 384, "n_layer": 12, "n_head": 6, "vocab_size": 16000, "n_positions": 1024}),
    "random bloom, 30 M": ("bloom", {"hidden_size": 384, "n_layer": 12, "n_head": 6, "vocab_size": 16000}),
}  # fmt: skip


class SameBatch:
    """The same batch for every step."""

    def __init__(self, batch: Batch) -> None:
        self.only = batch

    def batch(self, step: int) -> Batch:
        """The batch."""
        return self.only


def child(folder: str, num_rows: int, row_tokens: int, checkpointing: bool) -> None:
    """Train a few steps and print the peak of this process."""
    import datasets  # noqa: F401  what a run has loaded besides
    import flwr.app  # noqa: F401
    import rich.progress  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM

    from atoll.adapters.fresh import fresh_adapters
    from atoll.base.load import Base
    from atoll.config.schema import Train
    from atoll.cost.meters import PeakMemory, resident_peak_bytes
    from atoll.tasks.batches import Batch
    from atoll.training.local_trainer import LocalTrainer
    from atoll.training.trainer import FitPlan, TrainState

    floor = resident_peak_bytes()
    shapes = read_shapes(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    loaded = resident_peak_bytes()
    ids = torch.randint(shapes.vocab_size, (num_rows, row_tokens))
    positions = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    batches = SameBatch(Batch(ids, positions, ids.flatten()[positions + 1], None, None, (row_tokens,) * num_rows))
    ranks = {module.name: 8 for module in shapes.modules}
    state = fresh_adapters("lora", {m.name: (m.d_in, m.d_out) for m in shapes.modules}, ranks, 16.0, 0)
    trainer = LocalTrainer(Base(folder, model, None, False), Train(), STEPS, 0.0, 0, "local")  # type: ignore[arg-type]
    started = time.process_time()
    with PeakMemory() as peak:
        trainer.fit(TrainState(state, {}, 0), batches, FitPlan(STEPS, 1, checkpointing), lambda report: None)
    print(json.dumps({"floor": floor, "loaded": loaded, "peak": peak.num_bytes, "seconds": time.process_time() - started}))


def compare(title: str, folder: str) -> None:
    """One line for each case."""
    shapes = read_shapes(folder)
    ranks = {module.name: 8 for module in shapes.modules}
    for num_rows, row_tokens, checkpointing in CASES:
        if shapes.max_positions is not None and row_tokens > shapes.max_positions:
            continue
        memory = training_memory(
            shapes, ranks, num_rows=num_rows, row_tokens=row_tokens, num_label_tokens=num_rows * (row_tokens - 1), bits=32,
            activation_bytes=4, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        command = [sys.executable, __file__, "--child", folder, str(num_rows), str(row_tokens), str(int(checkpointing))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        parts = (memory.process_bytes, memory.base_bytes, memory.adapter_bytes, memory.activation_bytes, memory.logits_bytes)
        print(
            f"{title:38} {num_rows:3} x {row_tokens:4} {'checkpointed' if checkpointing else '':12}"
            f" foretold {format_bytes(memory.num_bytes):>8}  measured {format_bytes(measured['peak']):>8}"
            f"  ratio {memory.num_bytes / measured['peak']:.2f}   ({' + '.join(format_bytes(part) for part in parts)};"
            f" libraries {format_bytes(measured['floor'])}, base loaded {format_bytes(measured['loaded'])})",
            flush=True,
        )


def main() -> None:
    """Compare on the folders given, or on the built-in base and random ones."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")
        return
    if sys.argv[1:]:
        for folder in sys.argv[1:]:
            compare(Path(folder).name, folder)
        return
    if embedded.tiny_path().is_dir():
        compare("tiny", str(embedded.tiny_path()))
    from transformers import AutoConfig, AutoModelForCausalLM

    for title, (model_type, sizes) in RANDOM.items():
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
            compare(title, folder)


if __name__ == "__main__":
    main()
