"""One training task on disk, for both sides: a model folder, a fresh adapter in PEFT's format, and the same batches in the same order.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atoll.tasks.tokens import Example, Examples

SHARED = Path(__file__).resolve().parents[3] / "shared"
RANK, ALPHA, LEARNING_RATE, SEED, EDGE = 8, 16.0, 1e-3, 0, "bench"
RANDOM_15M = {
    "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 32000,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The sizes of llama2.c's 15 M model."""


def prepare(model: str, folder: Path, *, num_rows: int, batch_size: int, num_steps: int) -> None:
    """Write model/, adapter/, examples.npz (what Atoll batches) and batches.npz (the same batches for the Trainer's data loader)."""
    from atoll.adapters.fresh import fresh_adapters
    from atoll.adapters.peft_files import save_adapter
    from atoll.base.load import load_tokenizer
    from atoll.base.read_shapes import read_shapes
    from atoll.config.schema import Data
    from atoll.tasks.batches import BatchStream
    from atoll.tasks.rows import load_rows
    from atoll.tasks.text import text_form
    from atoll.tasks.tokens import pad_id, tokenize

    base = _model_folder(model, folder)
    tokenizer = load_tokenizer(str(base))
    rows = load_rows("trainset.csv", base_dir=SHARED / "data" / "e2e", limit=num_rows, on_bad_row="error")
    examples = tokenize(rows, text_form(Data(prompt="{mr} ->", completion=" {ref}"), rows.columns), tokenizer, 256)
    _write_examples(folder / "examples.npz", examples)
    stream = BatchStream(examples, batch_size, SEED, EDGE, "bucket", pad_id(tokenizer))
    assert num_steps <= len(examples) // batch_size, "one epoch of whole batches, so that every batch has the same number of rows"
    arrays = dict[str, Any]()
    for step in range(num_steps):
        batch = stream.batch(step)
        ids_BT = batch.input_ids_BT.numpy()
        labels = np.full(ids_BT.size, -100)
        labels[batch.predict_N.numpy() + 1] = batch.target_N.numpy()
        labels_BT = labels.reshape(ids_BT.shape)
        # The end token of every row carries loss, so the last label is where the row ends.
        lengths_B = ids_BT.shape[1] - np.argmax(labels_BT[:, ::-1] != -100, axis=1)
        assert lengths_B.sum() == batch.num_tokens
        arrays |= {f"ids{step}": ids_BT, f"labels{step}": labels_BT, f"lengths{step}": lengths_B}
    np.savez(folder / "batches.npz", **arrays)
    shapes = read_shapes(str(base))
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    save_adapter(fresh_adapters("lora", sizes, dict.fromkeys(sizes, RANK), ALPHA, SEED), folder / "adapter", base_name=str(base))


def _model_folder(model: str, folder: Path) -> Path:
    link = folder / "model"
    if model != "llama-15M":
        link.symlink_to(SHARED / "models" / model)
        return link
    random_llama(link, RANDOM_15M)
    return link


def random_llama(folder: Path, sizes: Mapping[str, Any]) -> None:
    """Write a Llama with random weights and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHARED / "models" / "tokenizer-llama2").save_pretrained(folder)


def _write_examples(path: Path, examples: Examples) -> None:
    lengths = np.array([len(example) for example in examples])
    np.savez(
        path, lengths=lengths, max_length=examples.max_length, ids=np.concatenate([example.token_ids for example in examples]),
        loss=np.concatenate([example.loss_mask for example in examples]),
    )  # fmt: skip


def read_examples(path: Path) -> Examples:
    """What `prepare` wrote."""
    stored = np.load(path)
    ends = np.cumsum(stored["lengths"])
    spans = list(zip(ends - stored["lengths"], ends, strict=True))
    items = tuple(Example(stored["ids"][start:stop].copy(), stored["loss"][start:stop].copy()) for start, stop in spans)
    return Examples(items, np.arange(len(items)), np.zeros(len(items), dtype=bool), 0, int(stored["max_length"]))
