"""How much memory a local training process needs, by formula: the process, the frozen base, adapters, activations, a block of logits.

Activations are the values that a backward pass needs and autograd therefore keeps, counted tensor by tensor for a block
x + attention(norm(x)), x + mlp(norm(x)). Not covered: attention masks of packed rows (T x T a row), mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atoll.cost.formulas import adapter_parameters
from atoll.shapes import BaseShapes

PROCESS_BYTES = 450 * 10**6
OPTIMIZER_BYTES_PER_PARAMETER = 16
LOGITS_CHUNK_BYTES = 32 * 2**20


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
) -> Memory:
    """Peak memory of a process that trains these adapters on batches of `num_rows` rows of `row_tokens` tokens."""
    kept = [_kept_per_token(shapes, ranks, block) for block in range(shapes.num_blocks)]
    scores = num_rows * shapes.num_heads * row_tokens**2 * (2 if shapes.keeps_scores else 0)
    lowest = min((m.block for m in shapes.modules if ranks.get(m.name, 0)), default=shapes.num_blocks)
    num_tokens = num_rows * row_tokens
    blocks = [num_tokens * floats + scores for floats in kept[lowest:]]
    largest = max(blocks, default=0)
    stored = num_tokens * shapes.d_model * len(blocks) + largest if gradient_checkpointing else sum(blocks)
    ends = shapes.d_model * (2 * num_tokens + 2 * num_label_tokens)
    rows_of_logits = min(num_label_tokens, max(16, LOGITS_CHUNK_BYTES // (4 * shapes.vocab_size)))
    return Memory(
        process_bytes=PROCESS_BYTES,
        base_bytes=shapes.num_parameters * bits // 8,
        adapter_bytes=OPTIMIZER_BYTES_PER_PARAMETER * adapter_parameters(shapes, ranks),
        activation_bytes=activation_bytes * (stored + largest + ends),
        logits_bytes=rows_of_logits * shapes.vocab_size * (4 + (activation_bytes if activation_bytes < 4 else 0)),
    )


def _kept_per_token(shapes: BaseShapes, ranks: Mapping[str, int], block: int) -> int:
    """Numbers kept for each token of one block.

    Both residuals for the norms (2 d); q, k, v and the output of attention (4 a); the values around the activation; and the input of
    every stage that has an adapter, whose `down` needs it.
    """
    inputs: dict[int, int] = {}
    activation = 0
    for module in shapes.modules:
        if module.block == block:
            if ranks.get(module.name, 0):
                inputs[module.stage] = module.d_in
            activation += module.d_out if module.stage == 2 else 0
    return 2 * shapes.d_model + 4 * shapes.attention_width + int(1.5 * activation) + sum(inputs.values())
