"""One training task on disk, for both sides: a model folder, a fresh adapter in PEFT's format, and the same batches in the same order.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atoll.embedded import tiny_path
from atoll.tasks.tokens import Example, Examples
from sides import pretrained
from sides.needs import shared

RANK, ALPHA, LEARNING_RATE, SEED, EDGE = 8, 16.0, 1e-3, 0, "bench"
RANDOM_15M = {
    "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 32000,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The sizes of llama2.c's 15 M model."""
RANDOM: dict[str, dict[str, Any]] = {
    "15M": RANDOM_15M,
    "100M": RANDOM_15M | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12},
}
TINY = "tiny"
"""The base that is built in."""


def prepare(
    model: str, folder: Path, *, num_rows: int, batch_size: int, num_steps: int, row_tokens: int = 256, texts: str = "e2e"
) -> None:  # fmt: skip
    """Write model/, adapter/, examples.npz (what Atoll batches) and batches.npz (the same batches for the Trainer's data loader).

    Rows have at most `row_tokens`.
    """
    from atoll.adapters.fresh import fresh_adapters
    from atoll.adapters.peft_files import save_adapter
    from atoll.base.load import load_tokenizer
    from atoll.base.read_shapes import read_shapes
    from atoll.tasks.batches import BatchStream
    from atoll.tasks.tokens import pad_id

    base = folder / "model"
    base.symlink_to(model_folder(model, folder / "random"))
    tokenizer = load_tokenizer(str(base))
    examples = examples_for(model, tokenizer, num_rows, row_tokens, texts)
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


def examples_for(model: str, tokenizer: Any, num_rows: int, row_tokens: int = 256, texts: str = "e2e") -> Examples:
    """Rows of E2E, or the longest of Alpaca ("alpaca"); for the tiny base those of the demo, which look like E2E's."""
    from atoll.config.schema import Data
    from atoll.tasks.rows import load_rows
    from atoll.tasks.text import text_form
    from atoll.tasks.tokens import tokenize

    if texts == "alpaca":
        source, folder, data = "alpaca_5000.json", shared("data", "alpaca"), Data(prompt="{instruction} {input}\n", completion="{output}")
    else:
        source, folder = ("demo", Path()) if model == TINY else ("trainset.csv", shared("data", "e2e"))
        data = Data(prompt="{mr} ->", completion=" {ref}")
    rows = load_rows(source, base_dir=folder, limit=None if texts == "alpaca" else num_rows, on_bad_row="error")
    examples = tokenize(rows, text_form(data, rows.columns), tokenizer, row_tokens)
    if texts != "alpaca":
        return examples
    longest = sorted(examples, key=len, reverse=True)[:num_rows]
    return dataclasses.replace(examples, items=tuple(longest), row_numbers=np.arange(len(longest)), was_cut=np.zeros(len(longest), bool))


def model_folder(model: str, folder: Path) -> Path:
    """Where the model lies: one of `RANDOM` is written into the folder, one of `pretrained.MODELS` is got once."""
    if model in RANDOM:
        _random_llama(folder, RANDOM[model])
        return folder
    if model in pretrained.MODELS:
        return pretrained.folder(model)
    return tiny_path() if model == TINY else shared("models", model)


def _random_llama(folder: Path, sizes: Mapping[str, Any]) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shared("models", "tokenizer-llama2")).save_pretrained(folder)


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
