"""What an exchange costs on the wire, in bytes, by formula. Opens without torch.

n: real tokens of the micro-batch. d: width of the hidden state. r: rank of a module's adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from atoll.registry.parts import known, wrong_result
from atoll.wire.codecs import codec_of

WireMode = Literal["dense", "factored", "lent"]
ModuleSizes = tuple[int, int, int]
"""d_in, d_out and rank of one adapted module."""

_LARGEST_VALUE_BYTES = 4
_HEADER_BYTES = 2**20 + 4


def encoded_bytes(shape: Sequence[int], codec: str) -> int:
    """Bytes of a tensor of this shape under a codec (or "raw"); int8 has a fp32 scale for every row along the last dimension.

    Raises: KeyError for another codec.

        >>> [encoded_bytes((3, 5), codec) for codec in ("fp32", "bf16", "int8", "raw")]
        [60, 30, 27, 15]
    """
    if codec == "raw":
        return math.prod(shape)
    if not is_codec(codec):
        raise KeyError(codec)
    num_bytes = codec_of(codec).num_bytes(shape)
    if not isinstance(num_bytes, int):
        raise wrong_result("codec", codec, "num_bytes", num_bytes, "a whole number of bytes")
    return num_bytes


def is_codec(name: str) -> bool:
    """Whether a codec of this name is loaded."""
    return known("codec", name) is not None


def killed_bytes(modules: Sequence[ModuleSizes]) -> int:
    """Tensor bytes of the one message that hands killed modules to the host: both factors of each, in fp32 whatever the codec.

    Two modules: 2 * (8 + 8) and 1 * (8 + 4) numbers.

        >>> killed_bytes([(8, 8, 2), (8, 4, 1)])
        176
        >>> killed_bytes([])
        0
    """
    return sum(encoded_bytes((rank, d_in + d_out), "fp32") for d_in, d_out, rank in modules)


def largest_message_bytes(
    groups: Sequence[Sequence[ModuleSizes]], d_model: int, max_tokens: int, *, killed: Sequence[ModuleSizes] = ()
) -> int:
    """Bytes of the largest message that a session of these groups may need, in any mode and codec, its header included.

    The hidden states with both factors of all modules, or a group's outputs and gradients, in fp32: int8 with its scales is no larger but
    for one value. Or the `killed` modules, all sent at once.

        >>> largest_message_bytes([[(8, 8, 2), (8, 8, 2)]], 8, 10)
        1049676
        >>> [largest_message_bytes([[(8, 8, 2)]], 8, 10, killed=[(8, 8, 2)] * count) for count in (0, 4, 5)]
        [1049148, 1049148, 1049220]
    """
    factors = sum(rank * (d_in + d_out) for group in groups for d_in, d_out, rank in group)
    widest = max([d_model, *(max(group[0][0], sum(d_out + rank for _, d_out, rank in group)) for group in groups)])
    return _HEADER_BYTES + max(_LARGEST_VALUE_BYTES * (max_tokens * (widest + 1) + factors), killed_bytes(killed))


def split_bytes(
    groups: Sequence[Sequence[ModuleSizes]],
    d_model: int,
    n_tokens: int,
    n_wanted: int,
    codec: str,
    mode: str,
    *,
    shared: bool,
    lowest_needs_input_gradient: bool,
    front_gradient: bool,
    has_factors: bool,
    ends_step: bool = True,
    adapter_codec: str = "fp32",
) -> tuple[int, int]:
    """Tensor bytes of one training exchange: from the device to the host, and back; without headers and frames.

    `groups` are the active ones in the order of the forward pass. Not `shared`: x and dx would travel once for every module. With no
    group and no front gradient nothing in the host or below needs a backward pass, and g stays where it is. Lent factors travel in the
    `adapter_codec`, and their gradients with the exchange that `ends_step`.

    One group of two modules (8 -> 8, rank 2), 10 tokens, 4 of them wanted, fp32, dense. Up: h 10*8, two deltas 2*10*8, g 4*8, and no dx,
    as nothing below needs it: 272 numbers. Down: x 10*8, h 4*8, two gradients 2*10*8: 272 numbers.

        >>> rest = {"shared": True, "lowest_needs_input_gradient": False, "front_gradient": False}
        >>> split_bytes([[(8, 8, 2), (8, 8, 2)]], 8, 10, 4, "fp32", "dense", has_factors=False, **rest)
        (1088, 1088)

    Factored: two u of 10*2 in place of the deltas and two factors of 2*8 before, 184 up; and as many beside h and x down.

        >>> split_bytes([[(8, 8, 2), (8, 8, 2)]], 8, 10, 4, "fp32", "factored", has_factors=True, **rest)
        (736, 736)

    Lent, nothing but 2*2*(8 + 8) numbers of the factors beside h and g up, and as many of their gradients beside h down.

        >>> split_bytes([[(8, 8, 2), (8, 8, 2)]], 8, 10, 4, "fp32", "lent", has_factors=True, **rest)
        (704, 384)

    No group at all: h 10*8 up, h 4*8 down.

        >>> split_bytes([], 8, 10, 4, "fp32", "dense", has_factors=False, **rest)
        (320, 128)
    """
    has_backward = bool(groups) or front_gradient
    up = [(n_tokens, d_model)] + [(n_wanted, d_model)] * has_backward
    down = [(n_wanted, d_model)] + [(n_tokens, d_model)] * front_gradient
    if mode == "lent":
        lent = _lent_bytes(groups, adapter_codec)
        return _bytes(up, codec) + lent * has_factors, _bytes(down, codec) + lent * ends_step
    for number, group in enumerate(groups):
        copies = 1 if shared else len(group)
        x = [(n_tokens, group[0][0])] * copies
        down += x
        up += x if number > 0 or lowest_needs_input_gradient else []
        up += _values(group, n_tokens, mode)
        down += _values(group, n_tokens, mode)
        factors = [(rank, d_out) for _, d_out, rank in group] if mode == "factored" else []
        up += factors if has_factors else []
        down += factors
    return _bytes(up, codec), _bytes(down, codec)


def _lent_bytes(groups: Sequence[Sequence[ModuleSizes]], codec: str) -> int:
    """Of both factors of all modules."""
    return _bytes((shape for group in groups for d_in, d_out, rank in group for shape in ((rank, d_in), (d_out, rank))), codec)


def _bytes(shapes: Iterable[tuple[int, int]], codec: str) -> int:
    return sum(encoded_bytes(shape, codec) for shape in shapes)


def _values(group: Sequence[ModuleSizes], n_tokens: int, mode: str) -> Iterator[tuple[int, int]]:
    """What an adapter adds, and its gradient."""
    return ((n_tokens, d_out if mode == "dense" else rank) for _, d_out, rank in group)
