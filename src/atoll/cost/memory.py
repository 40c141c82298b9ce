"""How much memory a training process needs, by formula: the process, the frozen base, adapters, activations, a block of logits.

Activations are the values that a backward pass needs and autograd therefore keeps, counted tensor by tensor for a block
x + attention(norm(x)), x + mlp(norm(x)). Not covered: attention masks of packed rows (T x T a row), mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from atoll.cost.formulas import adapter_parameters
from atoll.shapes import BaseShapes

# Measured by benchmarks/memory.py (Linux x86-64, CPU, torch 2.13.0, transformers 5.23.0, fp32, adapters on every projection).
PROCESS_BYTES = 505 * 10**6
"""torch, transformers, flwr, datasets and rich imported (477 MB), and what the first steps load lazily."""
OPTIMIZER_BYTES_PER_PARAMETER = 16
"""An adapter's number, its gradient and Adam's two moments, all fp32."""
LOGITS_CHUNK_BYTES = 32 * 2**20
"""Largest block of logits at once; a test holds it equal to base.head's."""
ALLOCATOR_SLACK = 1.4
"""Resident bytes per byte kept: glibc's heap keeps holes between tensors below 32 MiB. Measured 1.1 to 1.5."""
CHECKPOINT_SLACK = 3.0
"""The same where blocks are recomputed: short-lived tensors between long-lived ones leave more and larger holes. Measured 1.5 to 3.4."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what holds them, at the moment when all of it is largest."""

    process_bytes: int
    base_bytes: int
    adapter_bytes: int
    activation_bytes: int
    logits_bytes: int

    @property
    def num_bytes(self) -> int:
        """All of it: the foretold peak."""
        return self.process_bytes + self.base_bytes + self.adapter_bytes + self.activation_bytes + self.logits_bytes


def training_memory(
    shapes: BaseShapes,
    ranks: Mapping[str, int],
    *,
    num_rows: int,
    row_tokens: int,
    num_label_tokens: int,
    bits: int,
    activation_bytes: int,
    gradient_checkpointing: bool = False,
    elsewhere: Container[int] = (),
    merged: Container[str] = (),
) -> Memory:
    """Peak memory of a process that trains these adapters on batches of `num_rows` rows of `row_tokens` tokens.

    Blocks that run `elsewhere`, in a host, are not held; what their adapters read and add is. Modules that are `merged` have a second
    weight, with the adapter in it, beside the base's.
    """
    kept = [
        (_exchanged_per_token if block in elsewhere else _kept_per_token)(shapes, ranks, block) for block in range(shapes.num_blocks)
    ]
    scores = num_rows * shapes.num_heads * row_tokens**2 * (2 if shapes.keeps_scores else 0)
    lowest = min((m.block for m in shapes.modules if ranks.get(m.name, 0)), default=shapes.num_blocks)
    num_tokens = num_rows * row_tokens
    blocks = [num_tokens * kept[b] + (0 if b in elsewhere else scores) for b in range(lowest, shapes.num_blocks)]
    largest = max(blocks, default=0)
    stored = num_tokens * shapes.d_model * len(blocks) + largest if gradient_checkpointing else sum(blocks)
    ends = shapes.d_model * (2 * num_tokens + 2 * num_label_tokens)
    slack = CHECKPOINT_SLACK if gradient_checkpointing else ALLOCATOR_SLACK
    # Besides what is kept, one block's gradients and short-lived values.
    rows_of_logits = min(num_label_tokens, max(16, LOGITS_CHUNK_BYTES // (4 * shapes.vocab_size)))
    away = sum(module.num_weights for module in shapes.modules if module.block in elsewhere)
    twice = sum(module.num_weights for module in shapes.modules if module.block not in elsewhere and module.name in merged)
    return Memory(
        process_bytes=PROCESS_BYTES,
        base_bytes=(shapes.num_parameters - away + twice) * bits // 8,
        adapter_bytes=OPTIMIZER_BYTES_PER_PARAMETER * adapter_parameters(shapes, ranks),
        activation_bytes=int(slack * activation_bytes * (stored + largest + ends)),
        logits_bytes=rows_of_logits * shapes.vocab_size * 4,
    )


def _kept_per_token(shapes: BaseShapes, ranks: Mapping[str, int], block: int) -> int:
    """Numbers kept for each token of one block.

    Both residuals for the norms (2 d); q, k, v and the output of attention (4 a); around the activation gate, up and silu(gate) (3 f),
    or without a gate the four values of a GELU written out as GPT-2 does (4 f, an upper bound for others); and the input of every stage
    that has an adapter, whose `down` needs it.
    """
    inputs: dict[int, int] = {}
    entering = leaving = 0
    for module in (module for module in shapes.modules if module.block == block):
        if ranks.get(module.name, 0):
            inputs[module.stage] = module.d_in
        entering += module.d_out if module.stage == 2 else 0
        leaving = max(leaving, module.d_in if module.stage == 3 else 0)
    gated = entering >= 2 * leaving > 0
    return 2 * shapes.d_model + 4 * shapes.attention_width + (3 * leaving if gated else 4 * entering) + sum(inputs.values())


def _exchanged_per_token(shapes: BaseShapes, ranks: Mapping[str, int], block: int) -> int:
    """Numbers kept for each token of one block that runs in a host: what each adapted stage reads, what its adapters add, and their u."""
    inputs: dict[int, int] = {}
    added = 0
    for module in (module for module in shapes.modules if module.block == block and ranks.get(module.name, 0)):
        inputs[module.stage] = module.d_in
        added += module.d_out + 2 * ranks[module.name]
    return sum(inputs.values()) + added
