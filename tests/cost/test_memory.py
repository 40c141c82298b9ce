"""The memory formula: its parts, how it grows, and that it speaks of the program as it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from atoll.base import head
from atoll.base.load import load_base
from atoll.base.read_shapes import read_shapes
from atoll.cost import memory
from atoll.cost.memory import Memory, stored_bytes, training_memory
from atoll.shapes import BaseShapes, ModuleShape

from tests.conftest import save_model_folder

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
    assert peak(ranks={MODULES[0].name: 2}).adapter_bytes == (16 + 32) * 2 * 128


def test_an_accelerator_holds_what_is_trained_alone() -> None:
    def adapter_bytes(*, holds_all: bool) -> int:
        return training_memory(
            BASE, {MODULES[0].name: 2}, num_rows=1, row_tokens=8, num_label_tokens=8, bits=32, activation_bytes=4, holds_all=holds_all
        ).adapter_bytes

    assert adapter_bytes(holds_all=False) == 16 * 2 * 128
    assert adapter_bytes(holds_all=True) == peak(ranks={MODULES[0].name: 2}).adapter_bytes


def test_the_frozen_delta_has_numbers_a_message_and_a_copy_in_the_precision_of_the_arithmetic() -> None:
    def frozen_delta_bytes(precision_bytes: int, bits: int) -> int:
        return training_memory(
            BASE, ALL, num_rows=1, row_tokens=8, num_label_tokens=8, bits=bits, activation_bytes=precision_bytes,
            frozen_delta={MODULES[0].name: 20, MODULES[4].name: 3},
        ).frozen_delta_bytes

    numbers = 20 * (64 + 64) + 3 * (64 + 160)
    assert [frozen_delta_bytes(4, 32), frozen_delta_bytes(4, 8), frozen_delta_bytes(2, 16), frozen_delta_bytes(2, 4)] == [
        12 * numbers, 12 * numbers, 14 * numbers, 14 * numbers,
    ]  # fmt: skip
    assert peak().frozen_delta_bytes == 0


def test_a_merged_module_is_held_twice_where_it_is_held_at_all() -> None:
    q_proj, down_proj = MODULES[0], MODULES[13]

    def base_bytes(remote_blocks: tuple[int, ...], *names: str) -> int:
        return training_memory(
            BASE, {}, num_rows=1, row_tokens=8, num_label_tokens=8, bits=16, activation_bytes=2, remote_blocks=remote_blocks, merged=names
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


def test_the_peak_is_that_of_training_or_of_loading() -> None:
    foretold = peak()
    assert (foretold.loading_bytes, foretold.widened_bytes) == (0, 0)
    assert foretold.num_bytes == sum(dataclasses.astuple(foretold))
    for bits in (16, 8, 4):
        narrow = kept(bits)
        assert narrow.num_bytes == sum(dataclasses.astuple(narrow)) - narrow.loading_bytes
        loading = dataclasses.replace(narrow, adapter_bytes=0, activation_bytes=0, logits_bytes=0, widened_bytes=0)
        assert loading.num_bytes == narrow.process_bytes + narrow.base_bytes + narrow.loading_bytes > narrow.base_bytes


def kept(bits: int, ranks: dict[str, int] = ALL, remote_blocks: tuple[int, ...] = (), again: bool = False) -> Memory:
    """Blocks in so many bits, the rest in fp32."""
    return training_memory(
        BASE, ranks, num_rows=8, row_tokens=128, num_label_tokens=500, bits=bits, activation_bytes=4, remote_blocks=remote_blocks,
        gradient_checkpointing=again,
    )  # fmt: skip


def test_only_the_projections_of_blocks_that_are_here_shrink() -> None:
    per_block = sum(module.num_weights for module in MODULES if module.block == 0)
    others = 10**6 - 6 * per_block
    assert kept(32).base_bytes == peak().base_bytes
    assert kept(16).base_bytes == 4 * others + 2 * 6 * per_block
    assert kept(8).base_bytes == 4 * others + 6 * per_block + 4 * 6 * sum(out for _, _, out, _ in PARTS)
    assert kept(16, remote_blocks=(0, 1)).base_bytes == 4 * others + 2 * 4 * per_block
    assert kept(4).base_bytes < kept(8).base_bytes < kept(16).base_bytes < kept(32).base_bytes


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_stored_bytes_are_those_of_the_real_tensors(bits: int, tmp_path: Path) -> None:
    save_model_folder(tmp_path, "llama")
    shapes, base = read_shapes(str(tmp_path)), load_base(str(tmp_path), bits=bits)  # type: ignore[arg-type]
    for module in shapes.modules:
        assert stored_bytes(module, bits) == tensor_bytes(base.model.get_submodule(module.name), bits)


def tensor_bytes(module: torch.nn.Module, bits: int) -> int:
    """Counted from the storages of a loaded projection, with its scales and tables."""
    weight = module.weight
    tensors = [weight.data]
    if bits == 8:
        tensors.append(module.state.SCB)
    if bits == 4:
        state = weight.quant_state
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("again", [False, True])
def test_for_given_bits_and_batch_memory_is_affine_in_the_ranks(bits: int, again: bool) -> None:
    def with_rank(rank: int) -> Memory:
        return kept(bits, dict.fromkeys(ALL, rank), again=again)

    one, two, nine = with_rank(1), with_rank(2), with_rank(9)
    step = (16 + 32) * sum(module.d_in + module.d_out for module in MODULES)
    assert two.num_bytes - one.num_bytes == step
    assert nine.num_bytes - one.num_bytes == 8 * step
    assert nine.activation_bytes == one.activation_bytes


def test_activations_of_stages_add_up() -> None:
    def added(*names: str) -> int:
        lowest = {MODULES[1].name: 1}  # in block 0, so that all blocks are passed
        ranks = {**lowest, **{f"model.layers.{block}.{name}": 3 for block, name in enumerate(names, start=1) if name}}
        return kept(16, ranks).activation_bytes - kept(16, lowest).activation_bytes

    assert added("mlp.down_proj", "self_attn.o_proj") == pytest.approx(added("mlp.down_proj") + added("", "self_attn.o_proj"), abs=2)
    assert added("mlp.down_proj") == pytest.approx(4 * 8 * 128 * 160, abs=2)


def test_eight_bits_keep_the_input_of_every_product() -> None:
    only = {MODULES[0].name: 4}
    assert kept(8, only).activation_bytes > kept(4, only).activation_bytes == kept(16, only).activation_bytes
    assert kept(8).activation_bytes == kept(16).activation_bytes
