"""The formulas against their own worked examples, and against PyTorch's count of what a real step does."""

from __future__ import annotations

import doctest
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.targets import resolve_targets
from atoll.base.head import loss_sum
from atoll.base.shapes import read_shapes
from atoll.cost import formulas
from atoll.shapes import BaseShapes

from tests.conftest import random_model

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


def counted_flops(family: str, ranks: dict[str, int], shapes: BaseShapes, checkpointing: bool) -> int:
    """One forward and backward pass of a real model, as PyTorch counts its products."""
    model = random_model(family)
    model.set_attn_implementation("eager")
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    # Bottleneck adapters have the same products as LoRA, without the fused in-place product that the counter does not see.
    state = fresh_adapters("bottleneck", sizes, ranks, 1.0, 0)
    with attached(model, state), FlopCounterMode(display=False) as counter:
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()  # the library would ask for a gradient of the frozen embedding
            for module in model.modules():
                module.training = hasattr(module, "gradient_checkpointing")
        loss_sum(model, rows()).backward()
    return counter.get_total_flops()


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


def test_payload_is_the_adapters_bytes(tmp_path: Path) -> None:
    shapes = saved_shapes("llama", tmp_path)
    ranks = {module.name: 3 for module in shapes.modules}
    state = fresh_adapters("lora", {m.name: (m.d_in, m.d_out) for m in shapes.modules}, ranks, 1.0, 0)
    assert formulas.adapter_payload_bytes(shapes, ranks) == state.num_bytes
    assert formulas.adapter_parameters(shapes, ranks) == state.num_parameters


def test_no_adapters_is_a_forward_pass_of_the_blocks_and_nothing_else() -> None:
    shapes = read_shapes("tiny")
    flops = formulas.step_flops(shapes, {}, num_rows=1, row_tokens=1, num_label_tokens=1)
    forward = 2 * sum(module.num_weights for module in shapes.modules) + 4 * shapes.num_blocks * shapes.attention_width
    assert flops == formulas.Flops(forward, 0, 0)


def test_parts_add_up() -> None:
    one = formulas.Flops(1, 2, 3)
    assert (one + one).flops == one.times(2).flops == 12
