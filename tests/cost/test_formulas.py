"""The formulas against their own worked examples, and against PyTorch's count of what a real step does."""

from __future__ import annotations

import doctest
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.killed import Killed
from atoll.adapters.targets import resolve_targets
from atoll.base.head import head_of, loss_sum
from atoll.base.read_shapes import read_shapes
from atoll.cost import formulas
from atoll.cost.meters import CountedFlops
from atoll.federated.flower import RecordDict
from atoll.federated.payload import num_bytes, put_adapter
from atoll.shapes import BaseShapes
from atoll.split.cut import Cut
from atoll.training import local_trainer

from tests.conftest import random_model
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

ROWS, TOKENS, LABELS = 3, 16, 20


@dataclass(frozen=True)
class Rows:
    """Random tokens; the last LABELS positions of each are predicted."""

    input_ids_BT: Tensor
    predict_N: Tensor
    target_N: Tensor
    lengths: tuple[int, ...] = (TOKENS,) * ROWS
    position_ids_BT: Tensor | None = None
    attention_B1TT: Tensor | None = None


def rows() -> Rows:
    return Rows(torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 96, torch.arange(LABELS), torch.arange(LABELS))


def counted_flops(
    family: str, ranks: dict[str, int], shapes: BaseShapes, checkpointing: bool, killed: Mapping[str, int] = {},
    frozen_delta: Mapping[str, int] = {},
) -> int:  # fmt: skip
    """One forward and backward pass of a real model, as PyTorch counts its products, and this package's own counter with it."""
    model = random_model(family)
    model.set_attn_implementation("eager")
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    # Bottleneck adapters have the same products as LoRA, without the fused in-place product that the counter does not see.
    state = fresh_adapters("bottleneck", sizes, {**ranks, **killed}, 1.0, 0)
    lying, count = fresh_adapters("bottleneck", sizes, dict(frozen_delta), 1.0, 0), CountedFlops(head_of(model).weight_VD)
    placed = attached(model, state, killed=Killed(tuple(killed)), frozen_delta=lying)
    with placed, FlopCounterMode(display=False) as counter, count:
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()  # the library would ask for a gradient of the frozen embedding
            for module in model.modules():
                module.training = hasattr(module, "gradient_checkpointing")
        loss_sum(model, rows()).backward()
    assert count.head_flops == (formulas.head_flops(shapes, num_label_tokens=LABELS) if ranks else 0)
    assert count.flops == counter.get_total_flops()
    return count.flops


def saved_shapes(family: str, folder: Path) -> BaseShapes:
    random_model(family).save_pretrained(folder)
    return read_shapes(str(folder))


def test_worked_examples() -> None:
    runner, names = doctest.DocTestRunner(), dict(vars(formulas))
    tests = sorted(doctest.DocTestFinder().find(formulas, globs=names), key=lambda test: test.name != formulas.__name__)
    for test in tests:
        test.globs = names  # the base of the module's docstring, for all of them
        runner.run(test, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries > 10


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp", "1.mlp", "0.attn"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_what_pytorch_counts(family: str, targets: str, checkpointing: bool, tmp_path: Path) -> None:
    shapes = saved_shapes(family, tmp_path)
    block, _, kind = targets.rpartition(".")
    names = resolve_targets({"attn": "attention"}.get(kind, kind), shapes.modules)
    ranks = {name: 2 + number % 2 for number, name in enumerate(names) if not block or f".{block}." in name}
    foretold = formulas.step_flops(
        shapes, ranks, num_rows=ROWS, row_tokens=TOKENS, num_label_tokens=LABELS, gradient_checkpointing=checkpointing
    )
    counted = counted_flops(family, ranks, shapes, checkpointing)
    # Recomputation stops at the last value that the backward pass needs, which the formula does not know.
    assert counted == pytest.approx(foretold.flops, rel=0.01) or (checkpointing and 0.88 * foretold.flops < counted < foretold.flops)


KEPT = {"lowest is an input": (0, 0), "lowest is an output": (0, 1), "lowest is inside the mlp": (1, 2), "the very last": (1, 3)}
"""Block and stage of the active modules, all of that stage."""


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_with_killed_modules_are_what_pytorch_counts(family: str, kept: str, checkpointing: bool, tmp_path: Path) -> None:
    """With ranks so large that a product too much or too little of one killed module shows."""
    shapes = saved_shapes(family, tmp_path)
    ranks = {m.name: 4 for m in shapes.modules if (m.block, m.stage) == KEPT[kept]}
    killed = {m.name: 8 for m in shapes.modules if m.name not in ranks}
    foretold = formulas.step_flops(
        shapes, ranks, num_rows=ROWS, row_tokens=TOKENS, num_label_tokens=LABELS, gradient_checkpointing=checkpointing, frozen=killed
    )
    counted = counted_flops(family, ranks, shapes, checkpointing, killed)
    assert counted == pytest.approx(foretold.flops, rel=1e-9) or (checkpointing and 0.88 * foretold.flops < counted < foretold.flops)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_the_frozen_delta_are_what_pytorch_counts(family: str, kept: str, checkpointing: bool, tmp_path: Path) -> None:
    """On modules that are trained, and on all others."""
    shapes = saved_shapes(family, tmp_path)
    ranks = {m.name: 4 for m in shapes.modules if (m.block, m.stage) == KEPT[kept]}
    frozen_delta = {m.name: 12 for m in shapes.modules}
    foretold = formulas.step_flops(
        shapes, ranks, num_rows=ROWS, row_tokens=TOKENS, num_label_tokens=LABELS, gradient_checkpointing=checkpointing, frozen=frozen_delta
    )
    counted = counted_flops(family, ranks, shapes, checkpointing, frozen_delta=frozen_delta)
    assert counted == pytest.approx(foretold.flops, rel=1e-9) or (checkpointing and 0.88 * foretold.flops < counted < foretold.flops)


def test_part_of_a_stage_is_counted_no_lower_than_pytorch_does(tmp_path: Path) -> None:
    """Where only some of q, k and v are active in the lowest block, eager attention leaves out products that the formula counts."""
    shapes = saved_shapes("llama", tmp_path)
    for name in ("q_proj", "k_proj", "v_proj"):
        ranks = {m.name: 4 for m in shapes.modules if m.last_name == name and m.block == 0}
        killed = {m.name: 8 for m in shapes.modules if m.name not in ranks}
        foretold = formulas.step_flops(shapes, ranks, num_rows=ROWS, row_tokens=TOKENS, num_label_tokens=LABELS, frozen=killed).flops
        assert 0.95 * foretold < counted_flops("llama", ranks, shapes, False, killed) < foretold


def test_killed_modules_cost_nothing_where_they_are_not_evaluated_and_active_ones_always(tmp_path: Path) -> None:
    shapes = saved_shapes("llama", tmp_path)
    first, second = ({m.name: 2 for m in shapes.modules if m.block == block} for block in (0, 1))

    def count(ranks: dict[str, int], killed: dict[str, int], remote_blocks: set[int], again: bool = False) -> int:
        return formulas.adapter_flops(shapes, ranks, num_tokens=9, gradient_checkpointing=again, remote_blocks=remote_blocks, frozen=killed)

    assert count(first, second, {1}) == count(first, {}, set()) == count(first, {}, {0})
    assert count(first, second, {0}) == count(first, second, set()) > count(first, {}, set())
    assert count(first, {}, {0}, again=True) == count(first, {}, set())


@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("active", ["", "layers.0.", "layers.1.", "layers.2.", "layers.1.mlp.down_proj"])
def test_flops_of_a_device_are_what_pytorch_counts(active: str, checkpointing: bool, mode: str, tmp_path: Path) -> None:
    """The first and last of three blocks on the device. Recomputation does not run the exchange with the host again."""
    random_model("llama", BLOCKS).save_pretrained(tmp_path)
    shapes = read_shapes(str(tmp_path))
    ranks = {module.name: 3 for module in shapes.modules if active in module.name}
    killed = {module.name: 8 for module in shapes.modules if module.name not in ranks}
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    trainer, client = device_trainer("llama", Cut(1, 1), thread_host(served(random_model("llama", BLOCKS))), kind="bottleneck", mode=mode)
    model = trainer.base.model
    model.set_attn_implementation("eager")
    here = {name: rank for name, rank in killed.items() if ".1." not in name}
    start = fresh_adapters("bottleneck", sizes, {**ranks, **here}, 1.0, 0)
    counter = CountedFlops(head_of(model).weight_VD)
    with attached(model, start, killed=Killed(tuple(here))), local_trainer.checkpointing(model, checkpointing), counter:
        loss_sum(model, rows()).backward()
    client.end()
    foretold = formulas.step_flops(
        shapes, ranks, num_rows=ROWS, row_tokens=TOKENS, num_label_tokens=LABELS, gradient_checkpointing=checkpointing,
        remote_blocks={1}, frozen=killed, wire_mode=mode,
    )  # fmt: skip
    assert counter.head_flops == foretold.head_flops
    assert counter.flops == foretold.flops or (checkpointing and 0.88 * foretold.flops < counter.flops < foretold.flops)


def test_payload_is_the_adapters_bytes_and_messages_are_little_more(tmp_path: Path) -> None:
    shapes = saved_shapes("llama", tmp_path)
    ranks = {module.name: 3 for module in shapes.modules}
    state = fresh_adapters("lora", {m.name: (m.d_in, m.d_out) for m in shapes.modules}, ranks, 1.0, 0)
    assert formulas.adapter_payload_bytes(shapes, ranks) == state.num_bytes
    assert formulas.adapter_parameters(shapes, ranks) == state.num_parameters
    put_adapter(record := RecordDict(), state)
    wrapping = num_bytes(record) - state.num_bytes
    assert 0.8 * (formulas.message_bytes(shapes, len(ranks)) - formulas.message_bytes(shapes, 0)) < wrapping
    assert wrapping < formulas.message_bytes(shapes, len(ranks))


def test_no_adapters_is_a_forward_pass_of_the_blocks_and_nothing_else() -> None:
    shapes = read_shapes("tiny")
    flops = formulas.step_flops(shapes, {}, num_rows=1, row_tokens=1, num_label_tokens=1)
    forward = 2 * sum(module.num_weights for module in shapes.modules) + 4 * shapes.num_blocks * shapes.attention_width
    assert flops == formulas.Flops(forward, 0, 0)


def test_parts_add_up() -> None:
    one = formulas.Flops(1, 2, 3)
    assert (one + one).flops == one.times(2).flops == 12


def test_padding_does_not_travel_and_is_not_worked_on(tmp_path: Path) -> None:
    shapes = saved_shapes("llama", tmp_path)
    remote = {m.name: 3 for m in shapes.modules if m.block == 1}
    both = {m.name: 3 for m in shapes.modules}

    def count(ranks: dict[str, int], num_tokens: int, real: int | None = None) -> int:
        return formulas.adapter_flops(shapes, ranks, num_tokens=num_tokens, remote_blocks={1}, num_real_tokens=real)

    assert count(remote, 12, 9) == count(remote, 9) < count(remote, 12)
    front = {name: rank for name, rank in both.items() if name not in remote}
    assert count(both, 12) - count(both, 12, 9) == 2 * 3 * 3 * 3 * sum(m.d_in + m.d_out for m in shapes.modules if m.block == 1)
    assert count(front, 12, 9) == count(front, 12)
