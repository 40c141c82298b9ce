"""Tensors as bytes and back: what comes back, how far off it is, how many bytes it took, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.errors import ProtocolError
from atoll.registry.parts import names
from atoll.wire.encoding import Encoded, decode, encode, encoded_bytes, error_bound, raw

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
LARGEST = torch.finfo(torch.float32).max


def bits(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """Any bit patterns: infinities, NaNs with payloads, subnormal numbers, both zeros."""
    width = 32 if dtype == torch.float32 else 16

    def tensor(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
        count = int(torch.tensor(shape).prod())
        integers = st.lists(st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1), min_size=count, max_size=count)
        return integers.map(lambda values: torch.tensor(values, dtype=getattr(torch, f"int{width}")).view(dtype).view(shape))

    return SHAPES.flatmap(tensor)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))


@settings(max_examples=200, deadline=None)
@given(bits(torch.float32))
def test_fp32_comes_back_bit_for_bit(x: Tensor) -> None:
    encoded = encode(x, "fp32")
    assert encoded.num_bytes == encoded_bytes(x.shape, "fp32") == 4 * x.numel()
    assert same_bits(decode(encoded), x)


@settings(max_examples=200, deadline=None)
@given(bits(torch.bfloat16))
def test_bf16_comes_back_bit_for_bit_from_bf16(x: Tensor) -> None:
    encoded = encode(x, "bf16")
    assert encoded.num_bytes == encoded_bytes(x.shape, "bf16") == 2 * x.numel()
    assert same_bits(decode(encoded, dtype=torch.bfloat16), x)


@settings(max_examples=300, deadline=None)
@given(bits(torch.float32), st.sampled_from(names("codec")))
def test_errors_keep_to_their_bound(x: Tensor, codec: str) -> None:
    """Over all finite numbers there are, from subnormal ones to the largest."""
    x = x.nan_to_num(0.0, LARGEST, -LARGEST)
    back = decode(encode(x, codec))
    bound = error_bound(x, codec)
    assert bound.shape == x.shape[:-1]
    if codec != "bf16":
        assert torch.isfinite(back).all()
    error = (back.double() - x.double()).abs()
    assert (error <= bound.unsqueeze(-1)).all(), (error.max(), bound)


@pytest.mark.parametrize("value", [LARGEST, -LARGEST, 1e-45, 1e-44, 1.9e-43, 1e-38, 127.0, 1.0])
def test_int8_holds_at_the_ends_of_its_range(value: float) -> None:
    x = torch.tensor([[value, value / 2, 0.0, -value / 3]])
    back = decode(encode(x, "int8"))
    assert torch.isfinite(back).all()
    assert ((back.double() - x.double()).abs() <= error_bound(x, "int8")[:, None]).all()


def test_int8_shrinks_and_is_not_the_same() -> None:
    """So that no test of int8 passes because fp32 was sent."""
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    sizes = {codec: encode(x, codec).num_bytes for codec in names("codec")}
    halves = 16 * 256 * 2
    assert sizes == {"fp32": 16 * 256 * 4, "bf16": halves, "fp16": halves + 16 * 4, "int8": 16 * 256 + 16 * 4}
    back = decode(encode(x, "int8"))
    assert not torch.equal(back, x)
    assert all(len(row.unique()) <= 255 for row in back)
    assert (back - x).abs().max() < 0.02
    assert not torch.equal(decode(encode(x, "bf16")), x)


def test_int8_rows_do_not_touch_each_other() -> None:
    x = torch.tensor([[1e6, -1e6], [1e-6, 5e-7], [0.0, 0.0]])
    back = decode(encode(x, "int8"))
    assert ((back - x).abs() <= error_bound(x, "int8")[:, None]).all()
    assert torch.equal(back[2], x[2])


def test_int8_is_scales_and_then_values() -> None:
    encoded = encode(torch.tensor([[127.0, -1.0], [0.0, -254.0]]), "int8")
    assert bytes(encoded.data).hex(" ", 4) == "0000803f 00000040 7fff0081"


def test_int8_rows_without_a_scale_are_zeros() -> None:
    """Also where the largest magnitude is so small that a 127th of it is none."""
    assert bytes(encode(torch.tensor([[0.0, 0.0], [1e-45, 0.0]]), "int8").data) == bytes(12)


def test_fp16_is_powers_of_two_and_then_halves() -> None:
    """Whatever a row's size, its largest value uses all the bits of a half, and a value 2^38 times smaller is still there."""
    x = torch.tensor([[1.0, 2.0**-38], [-(2.0**127), 3.0 * 2.0**100], [2.0**-140, 0.0], [0.0, 0.0]])
    encoded = encode(x, "fp16")
    assert torch.frombuffer(bytearray(encoded.data[:16]), dtype=torch.float32).tolist() == [2.0**-14, 2.0**113, 2.0**-126, 2.0**-15]
    assert torch.equal(decode(encoded), x)


def test_bf16_says_where_it_ends() -> None:
    x = torch.tensor([[LARGEST], [3.3961e38]])
    assert error_bound(x, "bf16").isinf().tolist() == decode(encode(x, "bf16"))[:, 0].isinf().tolist() == [True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_int8_refuses_what_is_not_finite(value: float, place: tuple[int, int]) -> None:
    x = torch.ones(2, 3)
    x[place] = value
    with pytest.raises(ProtocolError, match="not finite"):
        encode(x, "int8")


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_others_carry_what_is_not_finite(codec: str) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    assert torch.equal(decode(encode(x, codec)), x) is False  # NaN is not equal to itself
    assert torch.equal(decode(encode(x, codec)).nan_to_num(7), x.nan_to_num(7)) or codec == "bf16"
    assert torch.equal(torch.isfinite(decode(encode(x, codec))), torch.isfinite(x))


@pytest.mark.parametrize("codec", names("codec"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_gradients_and_half_types_travel(codec: str, dtype: torch.dtype) -> None:
    x = torch.arange(24.0).view(4, 6).to(dtype).requires_grad_()
    for view in (x.T, x[::2, 1:4], x[1]):
        back = decode(encode(view, codec), dtype=dtype)
        assert back.dtype == dtype
        assert not back.requires_grad
        rounded = 0.0 if dtype == torch.float32 else 2.0**-8 * float(view.detach().abs().max())
        assert (back.float() - view.detach().float()).abs().max() <= error_bound(view, codec).max() + rounded


@pytest.mark.parametrize("codec", names("codec"))
def test_what_is_decoded_is_a_tensor_of_its_own(codec: str) -> None:
    x = torch.ones(2, 3)
    encoded = encode(x, codec)
    decode(encoded).add_(1)
    assert torch.equal(x, torch.ones(2, 3))
    assert torch.equal(decode(encoded), x)


def test_without_conversion_nothing_is_copied_before_it_is_sent() -> None:
    x = torch.zeros(2, 3)
    encoded = encode(x, "fp32")
    x[0, 0] = 1
    assert bytes(encoded.data)[:4] == bytes.fromhex("0000803f")


@pytest.mark.parametrize("codec", names("codec"))
@pytest.mark.parametrize("start", [0, 1, 4, 10])
def test_where_bytes_arrived_does_not_show(codec: str, start: int) -> None:
    """Matrix products sum in another order on memory that is aligned otherwise: a step would not give the same bits twice."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    encoded = encode(x, codec)
    arrived = bytearray(start) + bytearray(encoded.data)
    back = decode(Encoded(codec, encoded.shape, memoryview(arrived)[start:]))
    assert back.data_ptr() % 64 == 0
    assert torch.equal(back, decode(encoded))
    arrived[:] = bytes(len(arrived))
    assert torch.equal(back, decode(encoded))


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), torch.tensor(1.0),
                                    torch.zeros(1, 1, 1, 1)], ids=["fp64", "int64", "scalar", "four dimensions"])  # fmt: skip
def test_other_tensors_do_not_travel(tensor: Tensor) -> None:
    with pytest.raises(ProtocolError, match="cannot travel"):
        encode(tensor, "fp32")


@pytest.mark.parametrize("encoded", [
    Encoded("fp32", (2,), b"\0" * 7), Encoded("bf16", (2,), b"\0" * 8), Encoded("int8", (2, 2), b"\0" * 4), Encoded("fp32", (), b"\0" * 4),
    Encoded("fp64", (1,), b"\0" * 8), raw(b"\0" * 4),
], ids=["short", "long", "no scales", "scalar", "unknown", "raw"])  # fmt: skip
def test_bytes_that_do_not_fit_are_refused(encoded: Encoded) -> None:
    with pytest.raises(ProtocolError, match="do not fit"):
        decode(encoded)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 3e36])
def test_scales_that_cannot_be_are_refused(scale: float) -> None:
    with pytest.raises(ProtocolError, match="scale"):
        decode(Encoded("int8", (1, 2), torch.tensor([scale]).numpy().tobytes() + b"\x01\x02"))


@settings(deadline=None)
@given(SHAPES, st.sampled_from(names("codec")))
def test_the_formula_is_what_encode_makes(shape: tuple[int, ...], codec: str) -> None:
    assert encode(torch.zeros(shape), codec).num_bytes == encoded_bytes(shape, codec)


def test_raw_is_plain_bytes() -> None:
    assert (raw(b"abc").codec, raw(b"abc").shape, raw(b"abc").num_bytes) == ("raw", (3,), 3)
