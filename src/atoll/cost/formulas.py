"""What training costs, by formula: FLOPs, bytes on the wire, seconds. Pure arithmetic on shapes.

A product of an (n, a) and an (a, b) matrix is 2 n a b FLOPs: one multiplication and one addition for each of its terms. Norms,
activations and softmax are left out; they are O(n d) where the products are O(n d^2).

The doctests all speak of one small base: two blocks of one attention projection in (8 -> 8), one out, and a feed-forward pair 8 -> 16 -> 8.

    >>> from atoll.shapes import BaseShapes, ModuleShape, with_full_weights
    >>> parts = [("attn.qkv_proj", 8, 8, "attention"), ("attn.o_proj", 8, 8, "attention")]
    >>> parts += [("mlp.fc1", 8, 16, "mlp"), ("mlp.fc2", 16, 8, "mlp")]
    >>> modules = tuple(ModuleShape(f"h.{b}.{name}", i, o, kind, b) for b in (0, 1) for name, i, o, kind in parts)
    >>> base = BaseShapes("example", 1000, modules, 8, 32, 2, 64, True, 2.0, 2, 8, False)
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from atoll.shapes import BaseShapes, ModuleShape
from atoll.wire.byte_formulas import WireMode

ADAPTER_BYTES_PER_PARAMETER = 4
"""Adapters are kept in fp32, and travel so where nothing else is asked for."""
_FIGURES_BYTES, _BYTES_PER_MODULE = 1024, 24
"""Of a message: what an edge says of its work, and scalings and lengths of names; rounded up."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations by where they fall; the parts that summary.json names."""

    block_flops: int
    adapter_flops: int
    head_flops: int

    @property
    def flops(self) -> int:
        """All of them."""
        return self.block_flops + self.adapter_flops + self.head_flops

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.block_flops + other.block_flops, self.adapter_flops + other.adapter_flops, self.head_flops + other.head_flops)

    def times(self, count: int) -> Flops:
        """The same work done `count` times."""
        return Flops(self.block_flops * count, self.adapter_flops * count, self.head_flops * count)


def step_flops(
    shapes: BaseShapes,
    ranks: Mapping[str, int],
    *,
    num_rows: int,
    row_tokens: int,
    num_label_tokens: int,
    gradient_checkpointing: bool = False,
    remote_blocks: Container[int] = (),
    frozen: Mapping[str, int] = {},
    wire_mode: WireMode = "dense",
    num_real_tokens: int | None = None,
) -> Flops:
    """Forward and backward through the base, its adapters and its head, for `num_rows` rows of `row_tokens` tokens.

    `ranks` are those of active modules; `frozen` those of what is evaluated and not trained: killed modules, and the frozen delta. The
    `remote_blocks`, which a host runs, cost nothing here, nor does what is frozen there; their active adapters do, unless they are lent,
    on a factored wire their first factor only, for `num_real_tokens` where there is padding.

    With one adapter on the second block's fc1 and 10 label tokens of 2 rows x 6 tokens: forward 2*12*(64+64+128+128) = 9216 a block
    and scores 4*2*36*8 = 2304; backward only fc2's dx, 2*12*128 = 3072.

        >>> step_flops(base, {"h.1.mlp.fc1": 2}, num_rows=2, row_tokens=6, num_label_tokens=10)
        Flops(block_flops=26112, adapter_flops=3072, head_flops=10240)

    Adapters on everything: backward lacks only the dx of the lowest input projection, 2*12*64 = 1536.

        >>> step_flops(base, {m.name: 2 for m in modules}, num_rows=2, row_tokens=6, num_label_tokens=10).block_flops
        49152

    The first example with a frozen fc2 above, 2*12*2*24 = 1152 each way, and a frozen fc1 below, forward only, as much once.

        >>> frozen = {"h.0.mlp.fc1": 2, "h.1.mlp.fc2": 2}
        >>> step_flops(base, {"h.1.mlp.fc1": 2}, num_rows=2, row_tokens=6, num_label_tokens=10, frozen=frozen)
        Flops(block_flops=26112, adapter_flops=6528, head_flops=10240)
    """
    num_tokens = num_rows * row_tokens
    blocks = base_flops(
        shapes, ranks, num_rows=num_rows, row_tokens=row_tokens, gradient_checkpointing=gradient_checkpointing, remote_blocks=remote_blocks
    )
    adapters = adapter_flops(
        shapes, ranks, num_tokens=num_tokens, gradient_checkpointing=gradient_checkpointing, remote_blocks=remote_blocks, frozen=frozen,
        wire_mode=wire_mode, num_real_tokens=num_real_tokens,
    )  # fmt: skip
    if shapes.head:
        return Flops(blocks, adapters + class_head_flops(shapes, num_rows=num_label_tokens), 0)
    return Flops(blocks, adapters, head_flops(shapes, num_label_tokens=num_label_tokens) if ranks else 0)


def host_flops(
    shapes: BaseShapes, ranks: Mapping[str, int], *, num_rows: int, row_tokens: int, remote_blocks: Container[int],
    gradient_checkpointing: bool = False, frozen: Mapping[str, int] = {}, wire_mode: WireMode = "dense",
) -> int:  # fmt: skip
    """What a host computes of such a step: its blocks, with what is frozen there, and as many products of active adapters as the mode
    has it do.

    The last of two blocks, with fc1 adapted: 26112 less the first block's forward pass, 9216 and 2304 of scores. Dense, nothing of the
    adapter is made there; factored, B u and its two gradients, 2*12*2*16*3 = 2304; lent, all of it.

        >>> step = {"num_rows": 2, "row_tokens": 6, "remote_blocks": {1}}
        >>> modes = ("dense", "factored", "lent")
        >>> [host_flops(base, {"h.1.mlp.fc1": 2}, wire_mode=mode, **step) for mode in modes]
        [14592, 16896, 17664]

    A frozen fc2 above costs it 1152 each way. With lent adapters its blocks are run again where the device checkpoints, scores and all.

        >>> [host_flops(base, {"h.1.mlp.fc1": 2}, wire_mode=mode, frozen={"h.1.mlp.fc2": 2}, **step) for mode in modes]
        [16896, 19200, 19968]
        >>> host_flops(base, {"h.1.mlp.fc1": 2}, wire_mode="lent", gradient_checkpointing=True, **step)
        30336
    """
    num_tokens, elsewhere = num_rows * row_tokens, [block for block in range(shapes.num_blocks) if block not in remote_blocks]
    again = gradient_checkpointing and wire_mode == "lent"
    total = base_flops(
        shapes, ranks, num_rows=num_rows, row_tokens=row_tokens, gradient_checkpointing=again, remote_blocks=elsewhere
    )
    # "lent" leaves out what is active elsewhere.
    all_there = adapter_flops(
        shapes, ranks, num_tokens=num_tokens, gradient_checkpointing=again, remote_blocks=elsewhere, frozen=frozen, wire_mode="lent"
    )
    by_device, without_any = (
        adapter_flops(shapes, ranks, num_tokens=num_tokens, remote_blocks=remote_blocks, wire_mode=mode) for mode in (wire_mode, "lent")
    )
    return total + all_there - (by_device - without_any)


def base_flops(
    shapes: BaseShapes, ranks: Mapping[str, int], *, num_rows: int, row_tokens: int, gradient_checkpointing: bool = False,
    remote_blocks: Container[int] = (),
) -> int:  # fmt: skip
    """The frozen blocks, forward and backward, but for `remote_blocks`.

    A projection costs 2 n d_in d_out forward. Its weight is frozen, so that backward is the one product dx = dy W, as much again, and
    that only above the lowest adapted module: what it reads needs no gradient, nor does anything below. Attention scores are two
    products of T x T x width a row forward (Q K^T, P V) and four backward, counted in full, without the causal half. Checkpointing runs
    the blocks that have a backward pass forward once more (an upper bound: it may stop before a block's last product).

        >>> base_flops(base, {"h.0.attn.qkv_proj": 1}, num_rows=1, row_tokens=4)
        14848
        >>> base_flops(base, {"h.0.attn.qkv_proj": 1}, num_rows=1, row_tokens=4, gradient_checkpointing=True)
        22016
        >>> base_flops(base, {"h.0.attn.qkv_proj": 1}, num_rows=1, row_tokens=4, remote_blocks=range(2))
        0
    """
    num_tokens, lowest = num_rows * row_tokens, _lowest(shapes, ranks)
    scores = 4 * num_rows * row_tokens**2 * shapes.attention_width
    here = [block for block in range(shapes.num_blocks) if block not in remote_blocks]
    total = len(here) * scores
    for block in here:
        total += 2 * scores if (block, 0) >= lowest else 0
        total += scores if gradient_checkpointing and block >= lowest[0] else 0
    for module in (module for module in shapes.modules if module.block not in remote_blocks):
        passes = 1 + (_place(module) > lowest) + (gradient_checkpointing and module.block >= lowest[0])
        total += 2 * num_tokens * module.num_weights * passes
    return total


def adapter_flops(
    shapes: BaseShapes, ranks: Mapping[str, int], *, num_tokens: int, gradient_checkpointing: bool = False,
    remote_blocks: Container[int] = (), frozen: Mapping[str, int] = {}, wire_mode: WireMode = "dense",
    num_real_tokens: int | None = None,
) -> int:  # fmt: skip
    """The adapters, forward and backward: active ones (`ranks`) wherever their block runs, `frozen` ones but for those in `remote_blocks`.

    Padding does not travel: in `remote_blocks`, `num_real_tokens` of the tokens are worked on (None: all of them).

    Forward is u = A x and B u: 2 n r (d_in + d_out). Backward is twice that: gradients of A and B, of u, and of x; the last one, 2 n r
    d_in, only above the lowest active stage.

        >>> adapter_flops(base, {"h.0.attn.qkv_proj": 1}, num_tokens=4)
        320
        >>> adapter_flops(base, {"h.0.attn.qkv_proj": 1, "h.1.attn.qkv_proj": 1}, num_tokens=4)
        704

    A frozen adapter has no gradients of A and B: backward, those of u and of x, is as much as forward, and that only above the lowest
    active stage. Below fc1 of the first block, o_proj costs 2*4*16 = 128; above it, o_proj of the second block costs 256.

        >>> active = {"h.0.mlp.fc1": 1}
        >>> [adapter_flops(base, active, num_tokens=4, frozen={f"h.{b}.attn.o_proj": 1}) for b in (0, 1)]
        [640, 768]
        >>> adapter_flops(base, active, num_tokens=4, frozen={"h.1.attn.o_proj": 1}, remote_blocks={1})
        512

    Checkpointing runs those in blocks that have a backward pass forward once more; `remote_blocks` are not run again.

        >>> adapter_flops(base, active, num_tokens=4, frozen={"h.0.attn.o_proj": 1}, gradient_checkpointing=True)
        960
        >>> adapter_flops(base, active, num_tokens=4, gradient_checkpointing=True, remote_blocks={0})
        512

    On a factored wire the host makes B u and its two gradients for `remote_blocks`: of 512, fc1's 2*4*16*3 = 384 are not done here. Lent,
    it makes all of them.

        >>> [adapter_flops(base, active, num_tokens=4, remote_blocks={0}, wire_mode=mode) for mode in ("factored", "lent")]
        [128, 0]

    Of a full weight, the gradient is one product more than the frozen base has, 2 n d_in d_out; what was learned is
    summed into the weight, and costs no product.

        >>> adapter_flops(with_full_weights(base), active, num_tokens=4)
        1024
    """
    lowest, total, num_padded = _lowest(shapes, ranks), 0, num_tokens
    for module in shapes.modules:
        num_tokens = num_padded if module.block not in remote_blocks or num_real_tokens is None else num_real_tokens
        if module.full_weights:
            total += 2 * num_tokens * module.num_adapter_parameters(ranks.get(module.name, 0))
            continue
        here, above = module.block not in remote_blocks, _place(module) > lowest
        again = gradient_checkpointing and here and module.block >= lowest[0]
        rank = ranks.get(module.name, 0) if here or wire_mode != "lent" else 0
        frozen_rank = frozen.get(module.name, 0) if here else 0
        no_input_gradient = 0 if above else 2 * num_tokens * rank * module.d_in
        total += 2 * num_tokens * module.num_adapter_parameters(rank) * (3 + again) - no_input_gradient
        total -= 6 * num_tokens * rank * module.d_out if wire_mode == "factored" and not here else 0
        total += 2 * num_tokens * module.num_adapter_parameters(frozen_rank) * (1 + above + again)
    return total


def head_flops(shapes: BaseShapes, *, num_label_tokens: int) -> int:
    """Logits at label tokens only, 2 N d V, and one product back to the hidden states, as much again; the head's weight is frozen.

    >>> head_flops(base, num_label_tokens=10)
    10240
    """
    return 4 * num_label_tokens * shapes.d_model * shapes.vocab_size


def class_head_flops(shapes: BaseShapes, *, num_rows: int) -> int:
    """A classifier's head, on one hidden state a row: forward, back to the hidden state, and the gradient of a weight that is trained.

    It belongs to what is trained, and is counted with the adapters.

        >>> from dataclasses import replace
        >>> head = (ModuleShape("pooler", 8, 8, "other", 2), ModuleShape("classifier", 8, 20, "other", 2, full_weights=True))
        >>> class_head_flops(replace(base, head=head), num_rows=3)
        3648
    """
    return sum(2 * num_rows * module.num_weights * (2 + module.full_weights) for module in shapes.head)


def adapter_parameters(shapes: BaseShapes, ranks: Mapping[str, int]) -> int:
    """Trainable numbers: r (d_in + d_out) summed over the modules, or d_in d_out of full weights; and a classifier's head.

    >>> adapter_parameters(base, {"h.0.attn.qkv_proj": 2, "h.0.mlp.fc1": 1})
    56
    >>> adapter_parameters(with_full_weights(base), {"h.0.attn.qkv_proj": 8, "h.0.mlp.fc1": 8})
    192
    """
    return sum(module.num_adapter_parameters(ranks.get(module.name, 0)) for module in shapes.modules) + shapes.num_head_parameters


def adapter_payload_bytes(shapes: BaseShapes, ranks: Mapping[str, int], number_bytes: int = ADAPTER_BYTES_PER_PARAMETER) -> int:
    """One adapter on its way, in one direction; names and message framing are not counted.

    >>> adapter_payload_bytes(base, {"h.0.attn.qkv_proj": 2})
    128
    """
    return number_bytes * adapter_parameters(shapes, ranks)


def message_bytes(shapes: BaseShapes, num_modules: int) -> int:
    """What an adapter of so many modules is wrapped in, each way, at most: names as often as Flower's records hold them, and figures.

    >>> message_bytes(base, 2)
    1174
    """
    longest = max((len(module.name) for module in shapes.modules), default=0)
    return _FIGURES_BYTES + num_modules * (3 * longest + _BYTES_PER_MODULE)


def frozen_payload_bytes(shapes: BaseShapes, ranks: Mapping[str, int], number_bytes: int = ADAPTER_BYTES_PER_PARAMETER) -> int:
    """The frozen delta, on its way to an edge: a classifier's head is no part of it.

    >>> frozen_payload_bytes(base, {"h.0.attn.qkv_proj": 2, "h.0.mlp.fc1": 1})
    224
    """
    return number_bytes * (adapter_parameters(shapes, ranks) - shapes.num_head_parameters)


def round_seconds(
    flops: int, payload_bytes: int, *, flops_per_second: float | None, bits_per_second: float | None, latency_seconds: float | None,
    round_trips: int = 1, host_seconds: float = 0.0,
) -> float | None:  # fmt: skip
    """A round's time by an edge's declared speed and link: work / speed + bytes * 8 / rate + one latency each way for every round trip.

    Device and host wait for each other: `host_seconds` are added. What is not declared costs nothing; None where neither speed nor link
    is declared.

        >>> round_seconds(10**9, 10**6, flops_per_second=5e8, bits_per_second=8e6, latency_seconds=0.02)
        3.04
        >>> round_seconds(10**9, 10**6, flops_per_second=None, bits_per_second=None, latency_seconds=None) is None
        True
    """
    if flops_per_second is None and bits_per_second is None and latency_seconds is None:
        return None
    compute = flops / flops_per_second if flops_per_second else 0.0
    transfer = 8 * payload_bytes / bits_per_second if bits_per_second else 0.0
    return compute + transfer + 2 * round_trips * (latency_seconds or 0.0) + host_seconds


def _place(module: ModuleShape) -> tuple[int, int]:
    return module.block, module.stage


def _lowest(shapes: BaseShapes, ranks: Mapping[str, int]) -> tuple[int, int]:
    """Block and stage of the first adapted module; after everything where there is none."""
    return min((_place(module) for module in shapes.modules if ranks.get(module.name, 0)), default=(shapes.num_blocks, 0))
