"""Checks of codecs: as many bytes as are predicted, back within the bound, and no more of them than the other side has room for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atoll.errors import ProtocolError
from atoll.testing.law import Subject
from atoll.wire.encoding import decode, encode, error_bound

_SHAPES = ((1,), (5,), (3, 5), (1, 64), (2, 3, 8), (0, 4))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_codec(subject: Subject) -> None:
    """Raises: BrokenLaw."""
    for shape in _SHAPES:
        for dtype in _DTYPES:
            for case, values in _values(shape).items():
                _check_tensor(subject, f"{case} of shape {shape} in {dtype}", values.to(dtype))
    _check_tensor(subject, "a transposed tensor", torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).T)


def _check_tensor(subject: Subject, case: str, values: Tensor) -> None:
    before, shape, name = values.clone(), tuple(values.shape), subject.name
    num_bytes, rows = subject.make().num_bytes(shape), math.prod(shape[:-1])
    subject.expect(isinstance(num_bytes, int), f"num_bytes is a whole number, not {num_bytes!r:.60}")
    subject.expect(num_bytes <= 4 * math.prod(shape) + 4 * rows, f"{case}: {num_bytes} bytes are more than fp32 and one number a row")
    try:
        encoded = encode(values, name)
        subject.expect(encoded.num_bytes == num_bytes, f"{case}: {encoded.num_bytes} bytes where num_bytes says {num_bytes}")
        subject.expect(bytes(encode(values, name).data) == bytes(encoded.data), f"{case}: the same values are the same bytes")
        back = decode(encoded)
    except ProtocolError as problem:
        subject.expect(False, f"{case}: {problem.what}; {problem.got}")
        return
    subject.expect(bool(values.equal(before)), f"{case}: the values that are given stay as they are")
    subject.expect((tuple(back.shape), back.dtype) == (shape, torch.float32), f"{case}: came back as {tuple(back.shape)}, {back.dtype}")
    bound = error_bound(values.float(), name)
    subject.expect(isinstance(bound, Tensor), f"error_bound is a tensor, not {bound!r:.60}")
    subject.expect(tuple(bound.shape) == shape[:-1], f"{case}: a bound for each row, not of shape {tuple(bound.shape)}")
    error = (back.double() - values.double()).abs()
    worst = error.amax(dim=-1) if shape[-1] else torch.zeros(shape[:-1])
    subject.expect(bool((worst <= bound.double()).all()), f"{case}: an error of {worst.max() if worst.numel() else 0} beyond the bound")


def _values(shape: tuple[int, ...]) -> dict[str, Tensor]:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape) + len(shape)))
    return {"numbers": drawn, "zeros": torch.zeros(shape), "tiny numbers": drawn * 1e-4, "large numbers": drawn * 1e4}
