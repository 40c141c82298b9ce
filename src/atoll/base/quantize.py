"""A base whose projections are kept in 8 or 4 bits, as a host with little memory holds it: frozen, but gradients pass through."""

from __future__ import annotations

import importlib
import logging

from transformers import BitsAndBytesConfig

from atoll.base.blocks import trace
from atoll.base.load import DTYPES, Base, load_whole
from atoll.errors import ArchitectureError, BadValueError, UnavailableError

BITS = (4, 8)
_QUANTIZED = ("Linear4bit", "Linear8bitLt")


def load_quantized(name: str, bits: int, *, precision: str = "fp32") -> Base:
    """The base called `name` with the projections of its blocks in 4 bits (NF4, its scales in 8) or in 8; the rest in `precision`.

    GPT-2's transposed projections become plain ones.

    Raises: BadValueError for other bits, UnavailableError without bitsandbytes, ArchitectureError for a family with projections that
    cannot be quantized; and what load_base raises.
    """
    _require_library(bits)
    base = load_whole(name, precision, _settings(bits, precision))
    model = base.model
    plain = [name for group in trace(model).groups for name in group if type(model.get_submodule(name)).__name__ not in _QUANTIZED]
    if plain:
        raise ArchitectureError(
            "the base has projections that cannot be quantized", where=name, got=", ".join(plain[:3]),
            expected=f"blocks whose projections bitsandbytes can keep in {bits} bits", do="keep the base in 16 bits",
        )  # fmt: skip
    return base


def _settings(bits: int, precision: str) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPES[precision]
    )


def _require_library(bits: int) -> None:
    if bits not in BITS:
        raise BadValueError(
            "a base cannot be kept in this many bits", where="[model] quantize", got=str(bits), expected="4 or 8", do="choose one of them"
        )
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as problem:
        raise UnavailableError(
            f"a base in {bits} bits needs the library bitsandbytes", where="[model] quantize", got=str(problem), expected="bitsandbytes",
            do="pip install 'atoll[host]', or keep the base in 16 bits",
        ) from None  # fmt: skip
    # It says of every 8-bit product that its input is rounded to fp16, which is how the method works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
