"""The number formats in which tensors travel. How many bytes one takes is known without torch, which opens when a tensor is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

from atoll.registry.parts import find

if TYPE_CHECKING:
    import torch

_SCALE_BYTES = 4


class TensorCodec(Protocol):
    """A tensor of up to three dimensions as bytes, and back. It keeps nothing from one tensor to another, and takes no options.

    It is no larger than fp32 with one number more for every row along the last dimension: that is what the other side has room for.
    """

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Of a tensor of this shape, whatever is in it."""

    def encode(self, values: torch.Tensor) -> memoryview:
        """The values as so many bytes; they are fp32, bf16 or fp16, on any device.

        Raises: ProtocolError for values that cannot travel so.
        """

    def decode(self, data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """The values of bytes (uint8, as many as `num_bytes` says), on a device, in memory of their own or, where they stand, in `data`'s.

        Raises: ProtocolError for bytes that `encode` cannot have made.
        """

    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        """How far a value of each row can come back from what it was, in fp32, as a proven bound. Shapes: without the last dimension."""


@cache
def _made(target: type) -> TensorCodec:
    made: TensorCodec = target()
    return made


def codec_of(name: str) -> TensorCodec:
    """The codec of this name, of those that are loaded: a name that came over the network imports nothing.

    Raises: PartError where there is none.
    """
    return _made(find("codec", name).resolve())


class Fp32:
    """As it is."""

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Four for each value."""
        return 4 * math.prod(shape)

    def encode(self, values: torch.Tensor) -> memoryview:
        """A view of the memory of values that are fp32 already."""
        from atoll.wire.tensors import plain_bytes

        return plain_bytes(values, "float32")

    def decode(self, data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """The bytes as numbers."""
        from atoll.wire.tensors import plain_values

        return plain_values(data, shape, "float32", dtype, device)

    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        """Zero."""
        from atoll.wire.tensors import absmax

        return absmax(values) * 0.0


class Bf16:
    """Rounded to 8 bits of mantissa."""

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Two for each value."""
        return 2 * math.prod(shape)

    def encode(self, values: torch.Tensor) -> memoryview:
        """Rounded to the nearest, before it leaves an accelerator."""
        from atoll.wire.tensors import plain_bytes

        return plain_bytes(values, "bfloat16")

    def decode(self, data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """The bytes as numbers."""
        from atoll.wire.tensors import plain_values

        return plain_values(data, shape, "bfloat16", dtype, device)

    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        """2^-8 of the row's largest magnitude, and 2^-134 for the smallest numbers; infinite beyond the largest bf16 number."""
        from atoll.wire.tensors import absmax

        absmax_N = absmax(values)
        # Half a unit in the last place above the largest bf16 number, from where rounding goes to infinity.
        return (absmax_N * 2.0**-8 + 2.0**-134).masked_fill(absmax_N >= (2 - 2.0**-8) * 2.0**127, math.inf)


class Fp16:
    """Rounded to 11 bits of mantissa, with a power of two in fp32 for every row, so that no row is too large or too small for it."""

    def num_bytes(self, shape: Sequence[int]) -> int:
        """The scales, then two for each value."""
        return _SCALE_BYTES * math.prod(shape[:-1]) + 2 * math.prod(shape)

    def encode(self, values: torch.Tensor) -> memoryview:
        """Rounded to the nearest, ties to even."""
        from atoll.wire.tensors import halved

        return halved(values)

    def decode(self, data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """Halves times scale."""
        from atoll.wire.tensors import from_halves

        return from_halves(data, shape, dtype, device)

    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        """2^-11 of the row's largest magnitude, and 2^-149 for the smallest numbers."""
        from atoll.wire.tensors import absmax

        return absmax(values) * 2.0**-11 + 2.0**-149


class Int8:
    """A byte for each value, and a scale in fp32 for every row along the last dimension."""

    def num_bytes(self, shape: Sequence[int]) -> int:
        """The scales, then the values."""
        return _SCALE_BYTES * math.prod(shape[:-1]) + math.prod(shape)

    def encode(self, values: torch.Tensor) -> memoryview:
        """Rounded to 255 steps between minus and plus the row's largest magnitude."""
        from atoll.wire.tensors import quantized

        return quantized(values)

    def decode(self, data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """Steps times scale."""
        from atoll.wire.tensors import dequantized

        return dequantized(data, shape, dtype, device)

    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        """1/254 of the row's largest magnitude, a 2^-14th more for the roundings of scale and product, 2^-142 for the smallest numbers."""
        from atoll.wire.tensors import absmax

        return absmax(values) / 254 * (1 + 2.0**-14) + 2.0**-142
