"""The memory formula: its parts, how it grows, and that it speaks of the program as it is."""

from __future__ import annotations

import dataclasses

import pytest

from atoll.base import head
from atoll.cost import memory
from atoll.cost.memory import Memory, training_memory
from atoll.shapes import BaseShapes, ModuleShape

PARTS = (
    ("self_attn.q_proj", 64, 64, "attention"), ("self_attn.k_proj", 64, 32, "attention"), ("self_attn.v_proj", 64, 32, "attention"),
    ("self_attn.o_proj", 64, 64, "attention"), ("mlp.gate_proj", 64, 160, "mlp"), ("mlp.up_proj", 64, 160, "mlp"),
    ("mlp.down_proj", 160, 64, "mlp"),
)  # fmt: skip
MODULES = tuple(ModuleShape(f"model.layers.{b}.{name}", i, o, kind, b) for b in range(6) for name, i, o, kind in PARTS)  # type: ignore[arg-type]
BASE = BaseShapes("llama", 10**6, MODULES, 64, 1000, 6, 512, True, 4.0, 8, 64, False)
ALL = {module.name: 8 for module in MODULES}


def peak(
    shapes: BaseShapes = BASE,
    ranks: dict[str, int] = ALL,
    rows: int = 8,
    tokens: int = 128,
    labels: int = 500,
    bits: int = 32,
    again: bool = False,
) -> Memory:
    return training_memory(
        shapes, ranks, num_rows=rows, row_tokens=tokens, num_label_tokens=labels, bits=bits, activation_bytes=bits // 8,
        gradient_checkpointing=again,
    )  # fmt: skip


def test_logits_come_in_the_blocks_that_the_head_makes() -> None:
    assert memory.LOGITS_CHUNK_BYTES == head.CHUNK_BYTES
    large = peak(dataclasses.replace(BASE, vocab_size=128_000), labels=10**6)
    assert large.logits_bytes <= head.CHUNK_BYTES


def test_base_and_adapters_are_counted_to_the_byte() -> None:
    assert peak().base_bytes == 4 * 10**6
    assert peak(bits=16).base_bytes == 2 * 10**6
    assert peak(ranks={MODULES[0].name: 2}).adapter_bytes == 16 * 2 * 128


def test_a_merged_module_is_held_twice_where_it_is_held_at_all() -> None:
    q_proj, down_proj = MODULES[0], MODULES[13]

    def base_bytes(elsewhere: tuple[int, ...], *names: str) -> int:
        return training_memory(
            BASE, {}, num_rows=1, row_tokens=8, num_label_tokens=8, bits=16, activation_bytes=2, elsewhere=elsewhere, merged=names
        ).base_bytes

    assert base_bytes((), q_proj.name, down_proj.name) - base_bytes(()) == 2 * (64 * 64 + 160 * 64)
    assert base_bytes((1,), q_proj.name, down_proj.name) - base_bytes((1,)) == 2 * 64 * 64


def test_activations_grow_with_tokens_and_shrink_by_recomputation() -> None:
    assert peak(rows=16).activation_bytes > 1.8 * peak(rows=8).activation_bytes
    assert peak(tokens=256).activation_bytes == peak(rows=16).activation_bytes
    assert peak(again=True).activation_bytes < peak().activation_bytes
    assert peak(bits=16).activation_bytes == pytest.approx(peak().activation_bytes / 2, abs=2)


def test_nothing_is_kept_below_the_lowest_adapter() -> None:
    upper = {name: rank for name, rank in ALL.items() if ".5." in name}
    assert peak(ranks=upper).activation_bytes < peak().activation_bytes / 2


def test_scores_that_are_written_out_grow_with_the_square_of_the_row() -> None:
    eager = dataclasses.replace(BASE, keeps_scores=True)
    extra = peak(eager).activation_bytes - peak().activation_bytes
    assert peak(eager, tokens=256).activation_bytes - peak(tokens=256).activation_bytes == pytest.approx(4 * extra, rel=1e-3)


def test_the_peak_is_the_sum_of_its_parts() -> None:
    foretold = peak()
    assert foretold.num_bytes == sum(dataclasses.astuple(foretold))
