"""A base whose projections are kept in 16, 8 or 4 bits, for a machine with little memory: frozen, but gradients pass through."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from atoll.base.blocks import blocks_path, is_projection, projections_that_run
from atoll.base.skeleton.build import is_plain
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


def let_deep_inputs_in(model: PreTrainedModel) -> None:
    """Have bitsandbytes take inputs of more than three dimensions in 8 bits, as the compressed keys of latent attention are.

    It flattens those of three only (bitsandbytes 0.50.2, MatMul8bitLt).
    """
    for module in model.modules():
        if type(module).__name__ in _MADE_BY[8]:
            module.forward = partial(_flattened, module.forward)


def _flattened(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if x.ndim > 3 else forward(x)


def left_wide(model: PreTrainedModel) -> list[str]:
    """Names of linear modules that no library may narrow: those outside the blocks, and those whose weight the family reads itself."""
    runs, inside = projections_that_run(model), f"{blocks_path(model)}."
    linear = [name for name, module in model.named_modules() if is_projection(module)]
    return [name for name in linear if not name.startswith(inside) or (runs is not None and name not in runs)]


def check_kept(name: str, model: PreTrainedModel, bits: Bits, wide: Collection[str] = ()) -> None:
    """Look whether the projections of the blocks are kept as asked, but for the `wide` ones; of a family's own class they stay as they are.

    Raises: ArchitectureError for a family with projections that cannot be quantized.
    """
    path = blocks_path(model)
    blocks = {f"{path}.{inner}": module for inner, module in model.get_submodule(path).named_modules()}
    found = {full: module for full, module in blocks.items() if is_projection(module) and full not in wide}
    whole = [full for full, module in found.items() if type(module).__name__ not in _MADE_BY[bits]]
    if len(whole) == len(found) or any(is_plain(found[full]) for full in whole):
        raise ArchitectureError(
            "the base has projections that cannot be quantized", where=name, got=f"{whole[0]}, a {type(found[whole[0]]).__name__}",
            expected=f"blocks whose projections can be kept in {bits} bits",
            do='leave quantize out, or write precision = "bf16", which halves all weights',
        )  # fmt: skip


def _require_library(bits: int) -> None:
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as problem:
        raise UnavailableError(
            f"a base in {bits} bits needs the library bitsandbytes", where="[model] quantize", got=str(problem), expected="bitsandbytes",
            do="pip install 'atoll[host]', or keep the base in 16 bits",
        ) from None  # fmt: skip
    # It says of every 8-bit product that its input is rounded to fp16, which is how the method works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
