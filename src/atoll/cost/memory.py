"""How much memory a training process needs, by formula: the process, the frozen base, adapters, activations, a block of logits.

Activations are the values that a backward pass needs and autograd therefore keeps, counted tensor by tensor for a block
x + attention(norm(x)), x + mlp(norm(x)). Not covered: attention masks of packed rows (T x T a row), mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from atoll.cost.formulas import adapter_parameters
from atoll.shapes import BaseShapes, ModuleShape

# Measured by benchmarks/planned_memory.py (Linux x86-64 with glibc, CPU, torch 2.13.0, transformers 5.23.0, bitsandbytes 0.50.2, fp32).
PROCESS_BYTES = 570 * 10**6
"""torch, transformers, flwr, datasets and rich imported (505 MB), and what the first steps load lazily (20 to 110 MB, by the processor)."""
QUANTIZER_BYTES = {8: 80 * 10**6, 4: 60 * 10**6}
"""bitsandbytes and what its products load, by the bits that it keeps."""
OPTIMIZER_BYTES_PER_PARAMETER = 16
"""An adapter's number, its gradient and Adam's two moments, all fp32."""
HELD_BYTES_PER_PARAMETER = 32
"""Beside these, in the machine's memory: the numbers and moments that a round begins with (12), the messages that brought them (4 and 8),
the numbers that it ends with (4), and the coordinator's own where it is in the same process (4)."""
FROZEN_DELTA_BYTES_PER_PARAMETER = 12
"""Of the frozen delta: the number, the message that brought it, and the coordinator's own. It has no gradient, no moments."""
LOGITS_CHUNK_BYTES = 32 * 2**20
"""Largest block of logits at once; a test holds it equal to base.head's."""
PASSING_SHARE = 0.25
"""Gradients and short-lived values beside what is kept, as a share of what the largest block keeps: they are largest where the way back
begins, and what they need is freed meanwhile. All of it where the heap keeps what is freed."""
ALLOCATOR_SLACK = 1.4
"""Resident bytes per byte of activations: glibc's heap keeps holes between tensors below 32 MiB. Measured 1.1 to 1.5. None where a base
is kept in fewer bits than its precision has: there base.load has glibc give back each tensor of a megabyte or more."""
CHECKPOINT_SLACK = 3.0
"""The same where blocks are recomputed: short-lived tensors between long-lived ones leave more and larger holes. Measured 1.5 to 3.4."""
QUANTIZING_BYTES = {16: 6, 8: 14, 4: 22}
"""Bytes for each weight of the largest projection while the base is loaded: the wide weight, and what making it narrow needs."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what holds them, at the moment when all of it is largest."""

    process_bytes: int
    base_bytes: int
    adapter_bytes: int
    activation_bytes: int
    logits_bytes: int
    widened_bytes: int = 0
    """The largest projection made wide for one product, or summed up with what it has learned where its full weight is trained."""
    frozen_delta_bytes: int = 0
    """The frozen delta."""
    loading_bytes: int = 0
    """What loading needs for a moment besides the base, when nothing else is there yet."""

    @property
    def at_loading_bytes(self) -> int:
        """The predicted peak before anything is trained."""
        return self.process_bytes + self.base_bytes + self.loading_bytes

    @property
    def at_training_bytes(self) -> int:
        """The predicted peak of training."""
        held = self.process_bytes + self.base_bytes + self.adapter_bytes + self.frozen_delta_bytes
        return held + self.activation_bytes + self.logits_bytes + self.widened_bytes

    @property
    def num_bytes(self) -> int:
        """The predicted peak of the whole life of the process."""
        return max(self.at_loading_bytes, self.at_training_bytes)


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
    remote_blocks: Container[int] = (),
    merged: Container[str] = (),
    frozen_delta: Mapping[str, int] = {},
    process_bytes: int | None = None,
    holds_all: bool = True,
) -> Memory:
    """Peak memory of a process that trains these adapters on batches of `num_rows` rows of `row_tokens` tokens.

    The projections of the blocks are kept in `bits`, all other weights and the arithmetic in `activation_bytes` a number; where the two
    say the same, nothing is widened. `remote_blocks` run in a host and are not held; what their adapters read and add is. Modules
    that are `merged` have a second weight, with the adapter in it, beside the base's. `frozen_delta` are the ranks of the frozen delta,
    if any. `process_bytes`, where given, stand for all that is there before a model. An accelerator's memory does not hold all: what
    a round begins and ends with, and messages, lie in the machine's.

    For given bits, rows, tokens and checkpointing only `adapter_bytes` depends on ranks of blocks that are here, and in proportion;
    `activation_bytes` on which stages are adapted, a sum over the blocks from the lowest adapted one up.
    """
    here = [module for module in shapes.modules if module.block not in remote_blocks]
    narrow = bits < 8 * activation_bytes and bool(here)
    stored, largest = _numbers_kept(
        shapes, ranks, num_rows=num_rows, row_tokens=row_tokens, every_input=narrow and bits == 8, again=gradient_checkpointing,
        remote_blocks=remote_blocks,
    )  # fmt: skip
    share, slack = (PASSING_SHARE, 1.0) if narrow else (1.0, CHECKPOINT_SLACK if gradient_checkpointing else ALLOCATOR_SLACK)
    ends = shapes.d_model * (2 * num_rows * row_tokens + 2 * num_label_tokens)
    num_logits = shapes.head[-1].d_out if shapes.head else shapes.vocab_size
    rows_of_logits = min(num_label_tokens, max(16, LOGITS_CHUNK_BYTES // (4 * num_logits)))
    twice = sum(module.num_weights for module in here if module.name in merged)
    wide = sum(module.num_weights for module in here if not module.narrows)
    others = shapes.num_parameters - sum(module.num_weights for module in shapes.modules)
    widest_weight = max((module.num_weights for module in here), default=0)
    return Memory(
        process_bytes=PROCESS_BYTES + (QUANTIZER_BYTES.get(bits, 0) if narrow else 0) if process_bytes is None else process_bytes,
        base_bytes=(others + twice + wide) * activation_bytes + sum(stored_bytes(module, bits) for module in here if module.narrows),
        adapter_bytes=(OPTIMIZER_BYTES_PER_PARAMETER + HELD_BYTES_PER_PARAMETER * holds_all) * adapter_parameters(shapes, ranks),
        activation_bytes=int(slack * activation_bytes * (stored + share * largest + ends)),
        logits_bytes=rows_of_logits * num_logits * 4,
        widened_bytes=widest_weight * activation_bytes if narrow else _summed_bytes(here, ranks, activation_bytes),
        frozen_delta_bytes=_frozen_delta_bytes(shapes, frozen_delta, activation_bytes),
        loading_bytes=QUANTIZING_BYTES.get(bits, 0) * widest_weight if narrow else 0,
    )


def _frozen_delta_bytes(shapes: BaseShapes, ranks: Mapping[str, int], activation_bytes: int) -> int:
    # Where the arithmetic is narrower than fp32, a copy in its precision waits for the way back.
    rounded = activation_bytes if activation_bytes < 4 else 0
    numbers = sum(module.num_adapter_parameters(ranks.get(module.name, 0)) for module in shapes.modules)
    return (FROZEN_DELTA_BYTES_PER_PARAMETER + rounded) * numbers


def _summed_bytes(modules: Sequence[ModuleShape], ranks: Mapping[str, int], activation_bytes: int) -> int:
    """The largest full weight, summed up in fp32, and rounded where the arithmetic is narrower."""
    widest = max((module.num_weights for module in modules if module.full_weights and ranks.get(module.name, 0)), default=0)
    return widest * (4 + (activation_bytes if activation_bytes < 4 else 0))


def stored_bytes(module: ModuleShape, bits: int) -> int:
    """Bytes of a projection's weight at rest.

    8 bits: int8, and one fp32 scale for each output. 4 bits: two weights a byte; for each 64 weights a scale of one byte; for each 256 of
    these one fp32 scale; 4.13 bits a weight, and three tables (16 and 256 fp32 numbers, one offset) for each projection.

    Source: bitsandbytes' NF4 with double quantization, block sizes 64 and 256 (Dettmers et al., arXiv 2305.14314, section 3).
    """
    if bits == 8:
        return module.num_weights + 4 * module.d_out
    if bits == 4:
        scales = -(-module.num_weights // 64)
        return -(-module.num_weights // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)
    return module.num_weights * bits // 8


def _numbers_kept(
    shapes: BaseShapes, ranks: Mapping[str, int], *, num_rows: int, row_tokens: int, every_input: bool, again: bool,
    remote_blocks: Container[int],
) -> tuple[int, int]:  # fmt: skip
    """Numbers that the blocks keep when most are there, with checkpointing (`again`) inputs and one block; and those of the largest."""
    modules: list[list[ModuleShape]] = [[] for _ in range(shapes.num_blocks)]
    for module in shapes.modules:
        if not module.outside:  # What they keep is token ids, or the last hidden states, which are there anyway.
            modules[module.block].append(module)
    scores = num_rows * shapes.num_heads * row_tokens**2 * (2 if shapes.keeps_scores else 0)
    lowest = min((m.block for m in shapes.modules if ranks.get(m.name, 0)), default=shapes.num_blocks)
    num_tokens = num_rows * row_tokens
    with_gradient = range(max(0, lowest), shapes.num_blocks)
    blocks = [
        num_tokens * _exchanged_per_token(modules[block], ranks) if block in remote_blocks
        else num_tokens * _kept_per_token(shapes, modules[block], ranks, every_input) + scores
        for block in with_gradient
    ]  # fmt: skip
    # As if all its stages were adapted: a planner adds up costs by stage, and a largest block is no sum.
    everything = {module.name: 1 for block in with_gradient for module in modules[block]}
    widest = [
        _exchanged_per_token(modules[block], everything) if block in remote_blocks
        else _kept_per_token(shapes, modules[block], everything, True)
        for block in with_gradient
    ]  # fmt: skip
    largest = num_tokens * max(widest, default=0) + scores
    if not again:
        return sum(blocks), largest
    # bitsandbytes' 8-bit product holds its input where checkpointing does not see it, so that those of all blocks stay.
    held = sum(_inputs_per_token(modules[block], everything) for block in with_gradient if block not in remote_blocks) if every_input else 0
    return num_tokens * (shapes.d_model * len(blocks) + held) + largest, largest


def _kept_per_token(shapes: BaseShapes, modules: Sequence[ModuleShape], ranks: Mapping[str, int], every_input: bool) -> int:
    """Numbers kept for each token of one block.

    Both residuals for the norms (2 d); q, k, v and the output of attention (4 a); around the activation gate, up and silu(gate) (3 f),
    or without a gate the four values of a GELU written out as GPT-2 does (4 f, an upper bound for others); and the input of every stage
    that has an adapter, whose `down` needs it. With `every_input` that of every stage: bitsandbytes' 8-bit product keeps it.
    """
    entering = leaving = 0
    for module in modules:
        entering += module.d_out if module.stage == 2 else 0
        leaving = max(leaving, module.d_in if module.stage == 3 else 0)
    gated = entering >= 2 * leaving > 0
    inputs = _inputs_per_token(modules, {module.name: 1 for module in modules} if every_input else ranks)
    return 2 * shapes.d_model + 4 * shapes.attention_width + (3 * leaving if gated else 4 * entering) + inputs


def _exchanged_per_token(modules: Sequence[ModuleShape], ranks: Mapping[str, int]) -> int:
    """Numbers kept for each token of one block that runs in a host: what each adapted stage reads, what its adapters add, and their u."""
    return _inputs_per_token(modules, ranks) + sum(
        module.d_out + 2 * ranks[module.name] for module in modules if ranks.get(module.name, 0)
    )


def _inputs_per_token(modules: Sequence[ModuleShape], ranks: Mapping[str, int]) -> int:
    """Numbers that the adapted stages read; modules of a stage read the same."""
    return sum({module.stage: module.d_in for module in modules if ranks.get(module.name, 0)}.values())
