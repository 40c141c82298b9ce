"""Small bases for the planner's tests, and the costs of ranks on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from atoll.config.schema import RunConfig
from atoll.cost.split_traffic import remote_blocks
from atoll.planner import costs as costs_module
from atoll.planner.costs import Costs
from atoll.planner.feasibility import Setting
from atoll.planner.fedpipe.table import CostsOf
from atoll.shapes import BaseShapes, ModuleShape
from atoll.wire.byte_formulas import WireMode

PARTS = (
    ("self_attn.q_proj", 64, 64, "attention"), ("self_attn.k_proj", 64, 32, "attention"), ("self_attn.v_proj", 64, 32, "attention"),
    ("self_attn.o_proj", 64, 64, "attention"), ("mlp.up_proj", 64, 160, "mlp"), ("mlp.down_proj", 160, 64, "mlp"),
)  # fmt: skip


def base(num_blocks: int, parts: int = len(PARTS)) -> BaseShapes:
    modules = tuple(
        ModuleShape(f"model.layers.{block}.{name}", d_in, d_out, kind, block)  # type: ignore[arg-type]
        for block in range(num_blocks)
        for name, d_in, d_out, kind in PARTS[:parts]
    )
    return BaseShapes("llama", 10**6, modules, 64, 512, num_blocks, 512, True, 2.0, 4, 64, False)


def costs_of(
    shapes: BaseShapes, config: RunConfig, mode: Literal["local", "split"] = "local", *, checkpointing: bool = False, batch_size: int = 2,
    wire_mode: WireMode = "dense",
) -> CostsOf:  # fmt: skip
    there = remote_blocks(config, shapes) if mode == "split" else range(0)

    def costs(ranks: Mapping[str, int]) -> Costs:
        setting = Setting(shapes, ranks, 16, batch_size, 32, checkpointing, there)
        return costs_module.costs_of(config, setting, accumulate=2, wire_mode=wire_mode if mode == "split" else None)

    return costs
