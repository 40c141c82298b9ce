"""A base whose projections are kept in 16, 8 or 4 bits, for a machine with little memory: frozen, but gradients pass through."""

from __future__ import annotations

import importlib
import logging
from typing import Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from atoll.base.blocks import trace
from atoll.errors import ArchitectureError, BadValueError, UnavailableError

Bits = Literal[4, 8, 16]
BITS: tuple[Bits, ...] = (4, 8, 16)
_MADE_BY = {16: ("HalfLinear", "HalfConv1D"), 8: ("Linear8bitLt",), 4: ("Linear4bit",)}


def how_to_keep(bits: Bits, dtype: torch.dtype) -> QuantizationConfigMixin | None:
    """What from_pretrained is asked for; None: nothing, because `dtype` has this many bits anyway.

    Raises: BadValueError for other bits, UnavailableError without bitsandbytes.
    """
    if bits not in BITS:
        raise BadValueError(
            "a base cannot be kept in this many bits", where="[model] quantize", got=str(bits), expected="16, 8 or 4",
            do="choose one of them",
        )  # fmt: skip
    if bits == 16:
        # Imported here, because it enters itself into the library's registry.
        from atoll.base.half import HalfConfig

        return None if dtype == torch.bfloat16 else HalfConfig()
    _require_library(bits)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def let_gradients_through(model: PreTrainedModel) -> None:
    """Have bitsandbytes keep 4-bit weights in the one layout whose product has a backward pass.

    On processors with AVX512-BF16 a Linear4bit in eval mode otherwise lays its weight out anew at the first input that needs no gradient,
    for a product that lets none through from then on (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if type(module).__name__ in _MADE_BY[4]:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_kept(name: str, model: PreTrainedModel, bits: Bits) -> None:
    """Look whether every projection of the blocks is kept as asked.

    Raises: ArchitectureError for a family with projections that cannot be quantized.
    """
    plain = [name for group in trace(model).groups for name in group if type(model.get_submodule(name)).__name__ not in _MADE_BY[bits]]
    if plain:
        raise ArchitectureError(
            "the base has projections that cannot be quantized", where=name, got=", ".join(plain[:3]),
            expected=f"blocks whose projections can be kept in {bits} bits", do="keep the base as it is",
        )  # fmt: skip


def _require_library(bits: int) -> None:
    # Of a kernel from a hub, which it looks for at its import, for the product that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as problem:
        raise UnavailableError(
            f"a base in {bits} bits needs the library bitsandbytes", where="[model] quantize", got=str(problem), expected="bitsandbytes",
            do="pip install 'atoll[host]', or keep the base in 16 bits",
        ) from None  # fmt: skip
    # It says of every 8-bit product that its input is rounded to fp16, which is how the method works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
