"""The adapters, from what dense and factored mode send: the host knows x, and y = s B A x is linear.

Shape suffixes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from atoll.adapters.state import ModuleAdapter
from atoll.attacks.views import travelled
from atoll.wire.codecs import codec_of

Mode = Literal["dense", "factored", "lent"]


@dataclass(frozen=True, slots=True)
class Wire:
    """How tensors travel, and what the device drops of x before."""

    codec: str
    adapters: str
    dropout: float = 0.0


def product_error(adapter: ModuleAdapter, x_NI: Tensor, mode: Mode, wire: Wire) -> float:
    """How far what the host makes of the traffic is from s B A, relative to its norm.

    dense: least squares for s B A from x and s B A x. factored: for s A from x and s A x, and B as it came. lent: both as they came.
    """
    down_RI, up_OR = adapter.down_RI.float(), adapter.up_OR.float()
    true_OI = adapter.scaling * (up_OR.double() @ down_RI.double())
    codec, x_NI = codec_of(wire.codec), travelled(codec_of(wire.codec), x_NI)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u_NR = adapter.scaling * (nn.functional.dropout(x_NI, wire.dropout) @ down_RI.T)
    if mode == "lent":
        lent = codec_of(wire.adapters)
        found_OI = adapter.scaling * (travelled(lent, up_OR).double() @ travelled(lent, down_RI).double())
    elif mode == "factored":
        found_OI = travelled(codec, up_OR.T).T.double() @ _solved(x_NI, travelled(codec, u_NR))
    else:
        found_OI = _solved(x_NI, travelled(codec, u_NR @ up_OR.T))
    return float((found_OI - true_OI).norm() / true_OI.norm())


def _solved(x_NI: Tensor, y_NO: Tensor) -> Tensor:
    """M with M x = y, by least squares. Shapes: (O, I)."""
    return torch.linalg.lstsq(x_NI.double(), y_NO.double(), driver="gelsd").solution.T
