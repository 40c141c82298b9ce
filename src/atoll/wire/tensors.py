"""What codecs do to a tensor: little-endian, contiguous, one copy at most each way.

Shape suffixes: N rows (all dimensions but the last), D the last dimension.
"""

from __future__ import annotations

import math
import sys
from typing import Final

import torch
from torch import Tensor

from atoll.errors import ProtocolError, UnavailableError

_LARGEST_SCALE: Final = float.fromhex("0x1.020406p+121")
"""127 times it is still finite in fp32; without this limit the largest fp32 numbers would come back as infinity."""
_HALF_EXPONENT: Final = 15
"""The largest magnitude of a row travels as a half of 2^14 to 2^15: none is above the largest half, 65504."""
_LARGEST_HALF_SCALE: Final = 2.0 ** (128 - _HALF_EXPONENT)
_SMALLEST_NORMAL_EXPONENT: Final = -126

if sys.byteorder != "little":
    raise UnavailableError("split mode needs a little-endian machine", got=sys.byteorder, do="run this side on x86-64 or ARM64")


def plain_bytes(values: Tensor, name: str) -> memoryview:
    """The values in a type of torch's; where nothing is converted, a view of their memory."""
    # To the smaller type before it leaves an accelerator.
    return _view(values.to(getattr(torch, name)).cpu().contiguous().view(-1).view(torch.uint8))


def plain_values(data_B: Tensor, shape: tuple[int, ...], name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The values of such bytes, in the memory of the bytes where they can stay there."""
    return data_B.view(getattr(torch, name)).view(shape).to(device=device, dtype=dtype)


def quantized(values_ND: Tensor) -> memoryview:
    """Scales, then int8 values, as bytes.

    Raises: ProtocolError for values that are not finite.
    """
    values_ND = values_ND.cpu().float()
    absmax_N = _finite_absmax(values_ND, "int8")
    scale_N = (absmax_N / 127).clamp_(max=_LARGEST_SCALE)
    data_B = torch.empty(4 * len(scale_N) + values_ND.numel(), dtype=torch.uint8)
    num_scale_bytes = 4 * len(scale_N)
    data_B[:num_scale_bytes].view(torch.float32).copy_(scale_N)
    # A row of zeros has the scale 0: whatever it is divided by, it stays zeros.
    divisor_N1 = scale_N.masked_fill(scale_N == 0, 1).view(*values_ND.shape[:-1], 1)
    data_B[num_scale_bytes:].view(torch.int8).view(values_ND.shape).copy_((values_ND / divisor_N1).round_().clamp_(-127, 127))
    return _view(data_B)


def dequantized(data_B: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The values of such bytes.

    Raises: ProtocolError for scales that are not finite.
    """
    num_scale_bytes = 4 * math.prod(shape[:-1])
    scale_N, q_ND = data_B[:num_scale_bytes].view(torch.float32), data_B[num_scale_bytes:].view(torch.int8)
    if not bool(((scale_N >= 0) & (scale_N <= _LARGEST_SCALE)).all()):
        raise ProtocolError("an int8 tensor has a scale that cannot be", got="not finite, negative or too large", expected="absmax / 127")
    scale_ND = scale_N.to(device).view(*shape[:-1], 1)
    return q_ND.to(device=device, dtype=torch.float32).view(shape).mul_(scale_ND).to(dtype)


def halved(values_ND: Tensor) -> memoryview:
    """Scales that are powers of two, then fp16 values, as bytes.

    Raises: ProtocolError for values that are not finite.
    """
    values_ND = values_ND.cpu().float()
    exponent_N = torch.frexp(_finite_absmax(values_ND, "fp16")).exponent - _HALF_EXPONENT
    # By its bits: torch's own powers need not be exact.
    scale_N = (exponent_N.clamp_(min=_SMALLEST_NORMAL_EXPONENT) + 127).to(torch.int32).bitwise_left_shift_(23).view(torch.float32)
    num_scale_bytes = 4 * len(scale_N)
    data_B = torch.empty(num_scale_bytes + 2 * values_ND.numel(), dtype=torch.uint8)
    data_B[:num_scale_bytes].view(torch.float32).copy_(scale_N)
    data_B[num_scale_bytes:].view(torch.float16).view(values_ND.shape).copy_(values_ND / scale_N.view(*values_ND.shape[:-1], 1))
    return _view(data_B)


def from_halves(data_B: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The values of such bytes.

    Raises: ProtocolError for scales or values that are not finite.
    """
    num_scale_bytes = 4 * math.prod(shape[:-1])
    scale_N, half_ND = data_B[:num_scale_bytes].view(torch.float32), data_B[num_scale_bytes:].view(torch.float16)
    if not (bool(((scale_N > 0) & (scale_N <= _LARGEST_HALF_SCALE)).all()) and bool(half_ND.isfinite().all())):
        raise ProtocolError("an fp16 tensor has a number that cannot be", got="not finite, or too large", expected="finite numbers")
    scale_ND = scale_N.to(device).view(*shape[:-1], 1)
    return half_ND.to(device=device, dtype=torch.float32).view(shape).mul_(scale_ND).to(dtype)


def absmax(values: Tensor) -> Tensor:
    """Largest magnitude of each row, fp64; NaN where the row has one."""
    return _absmax(values.detach().cpu().float()).double()


def _finite_absmax(values_ND: Tensor, codec: str) -> Tensor:
    """Largest magnitude of each row, flat.

    Raises: ProtocolError where one is not finite.
    """
    absmax_N = _absmax(values_ND).reshape(-1)
    if not bool(torch.isfinite(absmax_N).all()):
        raise ProtocolError(
            f"a value that is not finite cannot travel as {codec}", got="NaN or infinity", expected="finite numbers",
            do='lower train.learning_rate, or let it travel as "fp32" (wire.codec, wire.adapters) to find it',
        )  # fmt: skip
    return absmax_N


def _absmax(values_ND: Tensor) -> Tensor:
    if values_ND.shape[-1] == 0:
        return values_ND.new_zeros(values_ND.shape[:-1])
    # Not aminmax: along the last dimension it takes ten times as long as these two.
    return torch.maximum(values_ND.amax(dim=-1), -values_ND.amin(dim=-1))


def bytes_tensor(data: bytes | memoryview) -> Tensor:
    """The bytes as uint8 in memory that can be written and begins where torch's own does.

    Matrix products sum in another order on memory that is not aligned to 64 bytes: a step would not give the same bits twice. Memory that
    can be written is what a message arrived in, and this tensor's alone.
    """
    if len(data) == 0:
        return torch.empty(0, dtype=torch.uint8)
    writable = isinstance(data, memoryview) and not data.readonly
    bytes_B = torch.frombuffer(data if writable else bytearray(data), dtype=torch.uint8)
    return bytes_B.clone() if bytes_B.data_ptr() % 64 else bytes_B


def _view(data_B: Tensor) -> memoryview:
    return data_B.numpy().data.toreadonly()
