"""A module of the base with an adapter beside it.

Shape suffixes: N tokens (all leading dimensions flattened), I inputs, O outputs, R rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atoll.adapters.state import Kind, ModuleAdapter
from atoll.errors import AdapterFitError

SMALL_WIDTH = 64
"""Modules with inputs * outputs <= 64 * (inputs + outputs) run with W + s B A formed: there one whole product is quicker than the thin
ones it replaces. Source: forward and backward timed in fp32 at rank 8, a third less time at 64 x 64, a seventh more at 288 x 288."""


class LowRankPair(nn.Module):
    """The trainable half of an adapted module: scaling * up f(down x), with f the identity (lora) or relu (bottleneck)."""

    def __init__(self, kind: Kind, down_RI: nn.Parameter, up_OR: nn.Parameter, scaling: float, dropout: float) -> None:
        super().__init__()
        self.kind, self.scaling, self.dropout = kind, scaling, dropout
        self.down_RI, self.up_OR = down_RI, up_OR

    @property
    def size(self) -> tuple[int, int, int]:
        """Inputs, outputs and rank."""
        return self.down_RI.shape[1], self.up_OR.shape[0], self.down_RI.shape[0]

    def low(self, x: Tensor) -> Tensor:
        """scaling * f(down x).

        Shapes: (..., inputs) to (..., rank).
        """
        dropped = nn.functional.dropout(x, self.dropout) if self.drops else x
        u = nn.functional.linear(dropped, self.down_RI.to(x.dtype))
        return (u.relu() if self.kind == "bottleneck" else u) * self.scaling

    def high(self, u: Tensor) -> Tensor:
        """up u.

        Shapes: (..., rank) to (..., outputs).
        """
        return nn.functional.linear(u, self.up_OR.to(u.dtype))

    @property
    def drops(self) -> bool:
        """Whether something of x is dropped: the base is in eval mode all the time, and only the adapter is switched to training."""
        return self.training and self.dropout > 0


def frozen_pair(kind: Kind, adapter: ModuleAdapter, device: torch.device) -> LowRankPair:
    """An adapter that is evaluated and not trained."""
    down, up = (nn.Parameter(matrix.to(device), requires_grad=False) for matrix in (adapter.down_RI, adapter.up_OR))
    return LowRankPair(kind, down, up, adapter.scaling, 0.0).eval()


class AdaptedLinear(LowRankPair):
    """y = base(x) + scaling * up f(down x); `base` stays frozen."""

    def __init__(self, base: nn.Module, pair: LowRankPair) -> None:
        super().__init__(pair.kind, pair.down_RI, pair.up_OR, pair.scaling, pair.dropout)
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The base's weight: some families look at a projection's weight (its dtype or device) from outside."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., inputs) to (..., outputs)."""
        if self.kind == "lora" and not self.drops and _is_plain(self.base):
            down_RI, up_OR = self.down_RI.to(x.dtype), self.up_OR.to(x.dtype)
            weight_OI = self.weight.T if isinstance(self.base, Conv1D) else self.weight
            low_rank = _MergedLowRank if _is_small(weight_OI) else _LinearPlusLowRank
            y: Tensor = low_rank.apply(x, weight_OI, self.base.bias, down_RI, up_OR, self.scaling)
            return y
        return self.base(x) + self.high(self.low(x))


class AdaptedEmbedding(LowRankPair):
    """y = base(ids) + scaling * up f(down e), e the unit vectors of the ids; `base` stays frozen. As in PEFT nothing is dropped out."""

    def __init__(self, base: nn.Module, pair: LowRankPair) -> None:
        super().__init__(pair.kind, pair.down_RI, pair.up_OR, pair.scaling, 0.0)
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The base's weight, which a tied head has, too."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: (...) to (..., outputs)."""
        y: Tensor = self.base(ids)
        base: Any = self._innermost()
        u = nn.functional.embedding(ids, self.down_RI.T.to(y.dtype), padding_idx=base.padding_idx)
        z = self.high((u.relu() if self.kind == "bottleneck" else u) * self.scaling)
        # Some families scale the embedding itself by a factor, and PEFT the pair beside it.
        scale = getattr(base, "embed_scale", None)
        return y + z if scale is None else y + z * torch.as_tensor(scale, device=z.device).to(z.dtype)

    def _innermost(self) -> nn.Module:
        base = self.base
        while isinstance(base, AdaptedEmbedding):
            base = base.base
        return base


class FullWeightLinear(nn.Module):
    """y = (W + D) x + b, or + (b + e) where the bias is trained too; `base` with its W and b stays frozen, D and e are trained.

    The sum is formed in fp32 and rounded to the base's precision for the product, as with master weights in mixed precision.
    """

    def __init__(self, base: nn.Module, change_OI: nn.Parameter, bias_O: nn.Parameter | None = None) -> None:
        super().__init__()
        self.base, self.change_OI, self.bias_O = base, change_OI, bias_O

    @property
    def weight(self) -> Tensor:
        """The base's weight: some families look at a projection's weight (its dtype or device) from outside."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., inputs) to (..., outputs)."""
        weight_OI = self.weight.T if isinstance(self.base, Conv1D) else self.weight
        bias_O: Any = self.base.bias
        bias_O = bias_O if self.bias_O is None else (bias_O + self.bias_O).to(x.dtype)
        y: Tensor = _ChangedLinear.apply(x, weight_OI, bias_O, self.change_OI)
        return y


def changed(name: str, base: nn.Module, change_OI: nn.Parameter, bias_O: nn.Parameter | None) -> FullWeightLinear:
    """The module with its full weight trained, and its bias where `bias_O` is given.

    Raises: AdapterFitError for a quantized module, or one without the bias.
    """
    if not _is_plain(base) or (bias_O is not None and base.bias is None):
        raise AdapterFitError(
            f"the full weight of {name} cannot be trained", got=type(base).__name__ + ("" if bias_O is None else " without a bias"),
            expected="a linear module in full precision", do='leave quantize out, or write kind = "lora" below [adapter]',
        )  # fmt: skip
    return FullWeightLinear(base, change_OI, bias_O).eval()


def adapted(base: nn.Module, pair: LowRankPair) -> AdaptedLinear | AdaptedEmbedding:
    """The module with the pair beside it."""
    return AdaptedEmbedding(base, pair).eval() if isinstance(base, nn.Embedding | AdaptedEmbedding) else AdaptedLinear(base, pair).eval()


def merged(name: str, base: nn.Module, pair: LowRankPair) -> nn.Module:
    """A module like `base`, its weight a sum of its own with the pair's product.

    Raises: AdapterFitError for a quantized module, or a bottleneck adapter, which has no product.
    """
    if not (_is_plain(base) or isinstance(base, nn.Embedding)) or pair.kind != "lora":
        raise AdapterFitError(
            f"the adapter of {name} cannot be merged", got=f"{pair.kind} adapter of a {type(base).__name__}",
            expected="a lora adapter of a module in full precision", do='write killed = "offload" in [select]',
        )  # fmt: skip
    module = copy.copy(base)
    delta_OI = pair.scaling * (pair.up_OR.double() @ pair.down_RI.double())
    module._parameters = {**base._parameters, "weight": nn.Parameter(merged_weight(base, delta_OI), requires_grad=False)}
    return module


def merged_weight(module: nn.Module, delta_OI: Tensor) -> Tensor:
    """The module's weight with a dense change added, summed in fp64."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    delta = delta_OI.to(weight.device)
    return (weight.double() + (delta.T if isinstance(module, Conv1D | nn.Embedding) else delta)).to(weight.dtype)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is exactly an unquantized Linear or Conv1D, and its weight is there, so that it may be used directly."""
    return type(module) in (nn.Linear, Conv1D) and not module.weight.is_meta


def _is_small(weight_OI: Tensor) -> bool:
    # In bf16 the sum would round the adapter's change away.
    return weight_OI.dtype == torch.float32 and weight_OI.numel() <= SMALL_WIDTH * sum(weight_OI.shape)


class _LinearPlusLowRank(torch.autograd.Function):
    """W x + b + s B A x as two fused products each way; the frozen weight needs no saved input, the pair saves x and A x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scaling: float) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        u_NR = x_NI @ down_RI.T
        y_NO = nn.functional.linear(x_NI, weight_OI, bias_O).addmm_(u_NR, up_OR.T, alpha=scaling)
        trained = ctx.needs_input_grad[3]
        ctx.save_for_backward(weight_OI, down_RI, up_OR, *((x_NI, u_NR) if trained else ()))
        ctx.scaling, ctx.x_shape = scaling, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        weight_OI, down_RI, up_OR, *kept = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, grads[0].shape[-1])
        gu_NR = (g_NO @ up_OR).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g_NO @ weight_OI).addmm_(gu_NR, down_RI).view(ctx.x_shape)
        if not kept:
            return grad_x, None, None, None, None, None
        x_NI, u_NR = kept
        return grad_x, None, None, gu_NR.T @ x_NI, (g_NO.T @ u_NR).mul_(ctx.scaling), None


class _MergedLowRank(torch.autograd.Function):
    """(W + s B A) x + b, the sum formed anew in each pass; both gradients come from the dense one, and only x is saved for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(weight_OI, down_RI, up_OR, *((x,) if ctx.needs_input_grad[3] else ()))
        ctx.scaling = scaling
        return nn.functional.linear(x, torch.addmm(weight_OI, up_OR, down_RI, alpha=scaling), bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        weight_OI, down_RI, up_OR, *kept = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_NI = g_NO @ torch.addmm(weight_OI, up_OR, down_RI, alpha=ctx.scaling)
            grad_x = grad_NI.view(*grads[0].shape[:-1], -1)
        if not kept:
            return grad_x, None, None, None, None, None
        (x,) = kept
        g_OI = (g_NO.T @ x.reshape(-1, x.shape[-1])).mul_(ctx.scaling)
        return grad_x, None, None, up_OR.T @ g_OI, g_OI @ down_RI.T, None


class _ChangedLinear(torch.autograd.Function):
    """(W + D) x + b, the sum formed anew in each pass; the gradient of D is the weight's own, and of all that only x is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, change_OI: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI, change_OI, *((x,) if ctx.needs_input_grad[3] else ()))
        return nn.functional.linear(x, (weight_OI + change_OI).to(x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        weight_OI, change_OI, *kept = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_NI = g_NO @ (weight_OI + change_OI).to(g_NO.dtype)
            grad_x = grad_NI.view(*grads[0].shape[:-1], -1)
        grad_bias = g_NO.sum(0) if ctx.needs_input_grad[2] else None
        grad_change = (g_NO.T @ kept[0].reshape(-1, kept[0].shape[-1])).to(change_OI.dtype) if kept else None
        return grad_x, None, grad_bias, grad_change
