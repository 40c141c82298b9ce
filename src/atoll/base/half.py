"""Projections kept in bf16 and computed in the precision of what they are given: half the memory, at a few percent of time.

bf16 products are a hundred times slower than fp32 ones on most CPUs, so each product makes the weight wide for itself, and again on its
way back: kept until then, the wide copies would be the whole base in fp32.

Shape suffixes: N tokens (all leading dimensions flattened), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from atoll.base.blocks import blocks_path, projections_that_run

_METHOD = "atoll-bf16-stored"


class HalfLinear(nn.Linear):
    """A frozen linear layer whose weight is bf16, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., inputs) to (..., outputs)."""
        y: Tensor = _WidenedLinear.apply(x, self.weight, self.bias)
        return y


class HalfConv1D(Conv1D):
    """The same for GPT-2's projections, whose weight is (inputs, outputs)."""

    @property
    def in_features(self) -> int:
        """Inputs."""
        return int(self.nx)

    @property
    def out_features(self) -> int:
        """Outputs."""
        return int(self.nf)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., inputs) to (..., outputs)."""
        y: Tensor = _WidenedLinear.apply(x, self.weight.T, self.bias)
        return y


class _WidenedLinear(torch.autograd.Function):
    """W x + b; only the narrow weight is kept, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return nn.functional.linear(x, weight_OI.to(x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (weight_OI,) = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, grads[0].shape[-1])
        return (g_NO @ weight_OI.to(g_NO.dtype)).view(*grads[0].shape[:-1], -1), None, None


@register_quantization_config(_METHOD)
class HalfConfig(QuantizationConfigMixin):
    """Asks from_pretrained for blocks whose projections are stored in bf16: they are read one by one, and never all of them in fp32."""

    def __init__(self) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]


@register_quantizer(_METHOD)
class _HalfLoader(HfQuantizer):
    """The library's seam between a model without weights and the reading of them, each in the type of the place that waits for it."""

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(  # type: ignore[override]
        self, model: PreTrainedModel, device_map: object = None, checkpoint_files: object = None, use_kernels: object = None
    ) -> None:
        path, runs = blocks_path(model), projections_that_run(model)
        blocks: Any = model.get_submodule(path)
        for name, module in list(blocks.named_modules()):
            if type(module) in (nn.Linear, Conv1D) and (runs is None or f"{path}.{name}" in runs):
                blocks.set_submodule(name, _half(module))

    def _process_model_after_weight_loading(self, model: PreTrainedModel) -> PreTrainedModel:  # type: ignore[override]
        # Nothing more to tell the library: from here on it is a model with some bf16 weights.
        self.remove_quantization_config(model)
        return model


def _half(module: Any) -> HalfLinear | HalfConv1D:
    """A layer of the same sizes without weights."""
    with torch.device("meta"):
        if isinstance(module, Conv1D):
            half: HalfLinear | HalfConv1D = HalfConv1D(module.nf, module.nx)
        else:
            half = HalfLinear(module.in_features, module.out_features, bias=module.bias is not None)
        half.weight = nn.Parameter(half.weight.to(torch.bfloat16), requires_grad=False)
    return half.requires_grad_(False)
