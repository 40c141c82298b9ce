"""Tensors as they travel, in the codec that a session agreed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.errors import ProtocolError
from atoll.registry.parts import wrong_result
from atoll.wire.byte_formulas import encoded_bytes, is_codec
from atoll.wire.codecs import codec_of
from atoll.wire.tensors import bytes_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A tensor as it travels."""

    codec: str
    """The name of a codec, or raw for plain bytes."""
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return len(self.data)


def encode(tensor: Tensor, codec: str) -> Encoded:
    """The tensor's values; where nothing is converted this is a view of its memory, which must stay as it is until it is sent.

    Shapes: one to three dimensions, of fp32, bf16 or fp16.
    Raises: ProtocolError for another dtype or number of dimensions, and for values that the codec does not take.
    """
    values = tensor.detach()
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not 1 <= values.ndim <= 3:
        raise ProtocolError(
            "this tensor cannot travel",
            got=f"{values.dtype}, shape {tuple(values.shape)}", expected="fp32, bf16 or fp16 in one to three dimensions",
        )  # fmt: skip
    data = codec_of(codec).encode(values)
    if not isinstance(data, bytes | memoryview):
        raise wrong_result("codec", codec, "encode", data, "a memoryview of bytes")
    return Encoded(codec, tuple(values.shape), data)


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The values as a tensor of its own; of a message that arrived, decode each tensor once.

    Raises: ProtocolError where codec, shape and number of bytes do not go together, and for bytes that the codec cannot have made;
    PartError for a codec that gives something else.
    """
    codec, shape = encoded.codec, encoded.shape
    if not is_codec(codec) or not shape or encoded.num_bytes != encoded_bytes(shape, codec):
        raise ProtocolError(
            "a tensor's bytes do not fit its description",
            got=f"{codec} of shape {shape} in {encoded.num_bytes} bytes", expected="a codec of this session, and the bytes of its shape",
        )  # fmt: skip
    values = codec_of(codec).decode(bytes_tensor(encoded.data), shape, dtype, device)
    if not isinstance(values, Tensor) or (tuple(values.shape), values.dtype) != (shape, dtype):
        got = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else values
        raise wrong_result("codec", codec, "decode", got, f"a tensor of shape {shape} and type {dtype}")
    return values


def raw(data: bytes) -> Encoded:
    """Plain bytes, such as a piece of a file."""
    return Encoded("raw", (len(data),), data)


def error_bound(tensor: Tensor, codec: str) -> Tensor:
    """How far a value of each row can come back from what it was, in fp32, as a proven bound.

    Shapes: those of the tensor without the last dimension.
    """
    return codec_of(codec).error_bound(tensor)
