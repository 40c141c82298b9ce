"""Published methods by name, and the settings of run.toml that each stands for."""

from __future__ import annotations

from collections.abc import Mapping

_WRITTEN = (
    "plan.policy=as-written", "plan.steps=asked", "federated.weigh=rows", "federated.combine=mean", "federated.aggregation=exact-svd",
    "federated.precision=fp32", "plan.depth=all",
)  # fmt: skip
_LORA = (*_WRITTEN, "adapter.kind=lora")
_FEDPIPE = (
    *_LORA, "plan.policy=fedpipe", "plan.importance=svd-sensitivity", "plan.depth=auto", "federated.aggregation=delta-svd",
    "federated.precision=fp16",
)  # fmt: skip
_FILLED = (*_FEDPIPE, "plan.steps=fill")
METHODS: Mapping[str, tuple[str, ...]] = {
    "full": (*_WRITTEN, "adapter.kind=full"),
    "lora": _LORA,
    "fedadapter": (*_WRITTEN, "plan.policy=fedadapter", "adapter.kind=bottleneck"),
    "hetlora": (*_LORA, "federated.aggregation=zero-pad"),
    "flora": (*_LORA, "federated.aggregation=stack"),
    "flexlora": _LORA,
    "dlora": (*_LORA, "run.placement=split", "select.policy=kill-and-revive"),
    "fedpipe": _FILLED,
    "fedpipe-without-importance": (*_FILLED, "plan.importance=none"),
    "fedpipe-without-depth": (*_FILLED, "plan.depth=all"),
    "fedpipe-without-ranks": (*_FILLED, "plan.ranks=[8]"),
    "fedpipe-without-quantization": (*_FILLED, "plan.bits=[16]", "model.quantize=auto"),
    "fedpipe-without-filling": _FEDPIPE,
}
"""What the override method=NAME stands for, in place of which --method NAME is written. docs/methods.md says what each is."""
