"""Tensors as bytes and back: fp32, bf16 or int8 with a scale for every row. Little-endian, contiguous, one copy at most here each way.

Shape suffixes: N rows (all dimensions but the last), D the last dimension.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from atoll.errors import ProtocolError, UnavailableError
from atoll.wire.accounting import Codec, encoded_bytes

__all__ = ["CODECS", "Codec", "Encoded", "decode", "encode", "encoded_bytes", "error_bound", "raw"]

CODECS: Final[tuple[Codec, ...]] = ("fp32", "bf16", "int8")
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LARGEST_SCALE: Final = float.fromhex("0x1.020406p+121")
"""127 times it is still finite in fp32; without this limit the largest fp32 numbers would come back as infinity."""

if sys.byteorder != "little":
    raise UnavailableError("split mode needs a little-endian machine", got=sys.byteorder, do="run this side on x86-64 or ARM64")


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A tensor as it travels."""

    codec: str
    """fp32, bf16, int8, or raw for plain bytes."""
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return len(self.data)


def encode(tensor: Tensor, codec: Codec) -> Encoded:
    """The tensor's values; where nothing is converted this is a view of its memory, which must stay as it is until it is sent.

    Shapes: one to three dimensions, of fp32, bf16 or fp16.
    Raises: ProtocolError for another dtype or number of dimensions, and for values under int8 that are not finite.
    """
    values = tensor.detach()
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not 1 <= values.ndim <= 3:
        raise ProtocolError(
            "this tensor cannot travel",
            got=f"{values.dtype}, shape {tuple(values.shape)}", expected="fp32, bf16 or fp16 in one to three dimensions",
        )  # fmt: skip
    if codec == "int8":
        data_B = _quantized(values.cpu().float())
    else:
        # To the smaller type before it leaves an accelerator.
        data_B = values.to(_DTYPES[codec]).cpu().contiguous().view(-1).view(torch.uint8)
    return Encoded(codec, tuple(values.shape), data_B.numpy().data.toreadonly())


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The values as a tensor of its own; of a message that arrived, decode each tensor once.

    Raises: ProtocolError where codec, shape and number of bytes do not go together, and for int8 scales that are not finite.
    """
    codec, shape = encoded.codec, encoded.shape
    if codec not in CODECS or not shape or encoded.num_bytes != encoded_bytes(shape, codec):
        raise ProtocolError(
            "a tensor's bytes do not fit its description",
            got=f"{codec} of shape {shape} in {encoded.num_bytes} bytes", expected="fp32, bf16 or int8, and the bytes of its shape",
        )  # fmt: skip
    data_B = _bytes_tensor(encoded.data)
    if codec != "int8":
        # Matrix products sum in another order on memory that is not aligned to 64 bytes, as torch's own is: a step would not give the
        # same bits twice. Memory that can be written is what a message arrived in, and this tensor's alone.
        keeps = isinstance(encoded.data, memoryview) and not encoded.data.readonly and data_B.data_ptr() % 64 == 0
        return data_B.view(_DTYPES[codec]).view(shape).to(device=device, dtype=dtype, copy=not keeps)
    num_scale_bytes = encoded.num_bytes - encoded_bytes(shape, "raw")
    scale_N, q_ND = data_B[:num_scale_bytes].view(torch.float32), data_B[num_scale_bytes:].view(torch.int8)
    if not bool(((scale_N >= 0) & (scale_N <= _LARGEST_SCALE)).all()):
        raise ProtocolError("an int8 tensor has a scale that cannot be", got="not finite, negative or too large", expected="absmax / 127")
    scale_ND = scale_N.to(device).view(*shape[:-1], 1)
    return q_ND.to(device=device, dtype=torch.float32).view(shape).mul_(scale_ND).to(dtype)


def raw(data: bytes) -> Encoded:
    """Plain bytes, such as a piece of a file."""
    return Encoded("raw", (len(data),), data)


def error_bound(tensor: Tensor, codec: Codec) -> Tensor:
    """How far a value of each row can come back from what it was, in fp32, as a proven bound.

    fp32: 0. bf16: 2^-8 of the row's largest magnitude, and 2^-134 for the smallest numbers; infinite beyond the largest bf16 number.
    int8: 1/254 of the row's largest magnitude, a 2^-14th more for the roundings of scale and product, and 2^-142 for the smallest numbers.

    Shapes: those of the tensor without the last dimension.
    """
    absmax_N = _absmax(tensor.detach().cpu().float()).double()
    if codec == "fp32":
        return torch.zeros_like(absmax_N)
    if codec == "bf16":
        # Half a unit in the last place above the largest bf16 number, from where rounding goes to infinity.
        return (absmax_N * 2.0**-8 + 2.0**-134).masked_fill(absmax_N >= (2 - 2.0**-8) * 2.0**127, torch.inf)
    return absmax_N / 254 * (1 + 2.0**-14) + 2.0**-142


def _quantized(values_ND: Tensor) -> Tensor:
    """Scales, then int8 values, as bytes."""
    absmax_N = _absmax(values_ND).reshape(-1)
    if not bool(torch.isfinite(absmax_N).all()):
        raise ProtocolError(
            "a value that is not finite cannot travel as int8",
            got="NaN or infinity", expected="finite numbers", do='lower train.learning_rate, or set wire.codec = "fp32" to find it',
        )  # fmt: skip
    scale_N = (absmax_N / 127).clamp_(max=_LARGEST_SCALE)
    data_B = torch.empty(encoded_bytes(values_ND.shape, "int8"), dtype=torch.uint8)
    num_scale_bytes = 4 * len(scale_N)
    data_B[:num_scale_bytes].view(torch.float32).copy_(scale_N)
    # A row of zeros has the scale 0: whatever it is divided by, it stays zeros.
    divisor_N1 = scale_N.masked_fill(scale_N == 0, 1).view(*values_ND.shape[:-1], 1)
    data_B[num_scale_bytes:].view(torch.int8).view(values_ND.shape).copy_((values_ND / divisor_N1).round_().clamp_(-127, 127))
    return data_B


def _absmax(values_ND: Tensor) -> Tensor:
    """Largest magnitude of each row; NaN where the row has one."""
    if values_ND.shape[-1] == 0:
        return values_ND.new_zeros(values_ND.shape[:-1])
    # Not aminmax: along the last dimension it takes ten times as long as these two.
    return torch.maximum(values_ND.amax(dim=-1), -values_ND.amin(dim=-1))


def _bytes_tensor(data: bytes | memoryview) -> Tensor:
    """The bytes as uint8; copied where torch would warn that they cannot be written, and where they are not aligned for fp32."""
    if len(data) == 0:
        return torch.empty(0, dtype=torch.uint8)
    writable = isinstance(data, memoryview) and not data.readonly
    bytes_B = torch.frombuffer(data if writable else bytearray(data), dtype=torch.uint8)
    return bytes_B.clone() if bytes_B.data_ptr() % 4 else bytes_B
