"""What a setting costs an edge, by formula: memory, FLOPs, bytes and round trips, and from these the time of a round; and how adapters
travel quickest to a host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from atoll.config.schema import PRECISION_BITS, Edge, RunConfig, Wire
from atoll.cost.formulas import adapter_payload_bytes, frozen_payload_bytes, host_flops, message_bytes, round_seconds, step_flops
from atoll.cost.split_traffic import step_bytes, step_round_trips
from atoll.planner.feasibility import Setting
from atoll.units import format_bytes, format_seconds
from atoll.wire.byte_formulas import WireMode

DEFAULT_LINK = (100e6, 0.02)
"""Bits per second and seconds each way, by which a wire mode is chosen where an edge declares no link."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Memory in training; of a step, with every row at full length, every token a label and every module active: an upper bound."""

    memory_bytes: int
    payload_bytes: int
    """Of the adapter, each way, once a round."""
    flops: int
    """Of a step."""
    up_bytes: int
    """Of a step's exchanges with a host."""
    down_bytes: int
    round_trips: int
    """Of a step, with a host."""
    frozen_delta_bytes: int = 0
    """Of the frozen delta, to the edge, once a round."""
    wrapping_bytes: int = 0
    """Of a round's messages, both ways together, beside numbers: in time, and in no count of bytes."""
    host_flops: int = 0
    """Of a step, in the host."""
    host_flops_per_second: float | None = None
    """What the host is declared to do; None: its computing takes no time."""

    @property
    def host_seconds(self) -> float:
        """Of a step, in the host."""
        return self.host_flops / self.host_flops_per_second if self.host_flops_per_second else 0.0

    def round_up_bytes(self, num_steps: int) -> int:
        """From the edge, in a round."""
        return self.payload_bytes + num_steps * self.up_bytes

    def round_down_bytes(self, num_steps: int) -> int:
        """To the edge, in a round."""
        return self.payload_bytes + self.frozen_delta_bytes + num_steps * self.down_bytes

    def round_seconds(self, edge: Edge, num_steps: int) -> float | None:
        """Of a round by the edge's declared speed and link; None where neither is declared."""
        return round_seconds(
            num_steps * self.flops, self.round_up_bytes(num_steps) + self.round_down_bytes(num_steps) + self.wrapping_bytes,
            flops_per_second=edge.flops, bits_per_second=edge.bandwidth, latency_seconds=edge.latency,
            round_trips=1 + num_steps * self.round_trips, host_seconds=num_steps * self.host_seconds,
        )  # fmt: skip

    def steps_by(self, deadline: float | None, edge: Edge, most: int) -> int:
        """Steps that the edge can do in so many seconds, at most so many."""
        without, one = self.round_seconds(edge, 0), self.round_seconds(edge, 1)
        if deadline is None or without is None or one is None:
            return most
        if one <= without:
            return most if without <= deadline else 0
        return max(0, min(most, math.floor((deadline - without) / (one - without) * (1 + 1e-12))))


def costs_of(config: RunConfig, setting: Setting, *, accumulate: int, wire_mode: WireMode | None) -> Costs:
    """Costs of steps of `accumulate` micro-batches each, with a host to which adapters travel so, or (None) without one."""
    shapes, ranks, num_rows, row_tokens = setting.shapes, setting.ranks, setting.batch_size, setting.row_tokens
    up_bytes = down_bytes = trips = there = 0
    if wire_mode is not None:
        wire = step_bytes(
            config, shapes, ranks, wire_mode, num_tokens=accumulate * num_rows * row_tokens,
            num_label_tokens=accumulate * setting.num_label_tokens, num_exchanges=accumulate,
        )  # fmt: skip
        up_bytes, down_bytes = wire.up_bytes, wire.down_bytes
        trips = step_round_trips(config, shapes, ranks, wire_mode, num_exchanges=accumulate)
        there = accumulate * host_flops(
            shapes, ranks, num_rows=num_rows, row_tokens=row_tokens, remote_blocks=setting.remote_blocks,
            gradient_checkpointing=setting.gradient_checkpointing, wire_mode=wire_mode,
        )  # fmt: skip
    flops = step_flops(
        shapes, ranks, num_rows=num_rows, row_tokens=row_tokens, num_label_tokens=setting.num_label_tokens,
        gradient_checkpointing=setting.gradient_checkpointing, remote_blocks=setting.remote_blocks, frozen=setting.frozen_delta,
        wire_mode=wire_mode or "dense",
    ).times(accumulate)  # fmt: skip
    number_bytes = PRECISION_BITS[config.federated.precision] // 8
    return Costs(
        setting.memory.at_training_bytes, adapter_payload_bytes(shapes, ranks, number_bytes), flops.flops, up_bytes, down_bytes, trips,
        frozen_payload_bytes(shapes, setting.frozen_delta, number_bytes),
        2 * message_bytes(shapes, len(ranks)) + message_bytes(shapes, len(setting.frozen_delta)), there, config.wire.host_flops,
    )  # fmt: skip


def wire_modes(wire: Wire) -> tuple[WireMode, ...]:
    """Those to choose from."""
    return get_args(WireMode) if wire.mode == "auto" else (wire.mode,)


def step_seconds(costs: Costs, edge: Edge, wire: Wire) -> float:
    """Of a step with a host, by what is declared of speeds and link; of a link that is not declared, by the default one."""
    bandwidth, latency, _ = _link(edge, wire)
    compute = costs.flops / edge.flops if edge.flops else 0.0
    return compute + costs.host_seconds + 8 * (costs.up_bytes + costs.down_bytes) / bandwidth + 2 * costs.round_trips * latency


def quickest(
    costs: Callable[[WireMode], Costs], edge: Edge, wire: Wire, steps_in_time: Callable[[Costs], int] = lambda _: 0
) -> tuple[WireMode, str]:  # fmt: skip
    """The mode in which a step takes least, and why; of equal ones that of fewer bytes, then that which tells the host least.

    None is taken with which fewer steps are done in time: by a link that is not declared nobody is late.
    """
    asked = wire_modes(wire)
    if len(asked) == 1:
        return asked[0], f"{asked[0]}, as run.toml says"
    by_mode = {mode: costs(mode) for mode in asked}
    seconds = {mode: step_seconds(one, edge, wire) for mode, one in by_mode.items()}

    def rank(mode: WireMode) -> tuple[int, float, int]:
        one = by_mode[mode]
        return -steps_in_time(one), seconds[mode], one.up_bytes + one.down_bytes

    def told(mode: WireMode, over: str = "") -> str:
        one = by_mode[mode]
        return f"{format_seconds(seconds[mode])}{over} ({format_bytes(one.up_bytes + one.down_bytes)}, {one.round_trips} round trips)"

    first, *others = sorted(asked, key=rank)
    late = " as it does more steps in time;" if seconds[first] > min(seconds.values()) else ""
    rest = ", ".join(f"{mode} {told(mode)}" for mode in others)
    return first, f"{first}:{late} {told(first, f' a step over {_link(edge, wire)[2]}')}, {rest}"


def _link(edge: Edge, wire: Wire) -> tuple[float, float, str]:
    """Bits per second and seconds each way of the link to the host, and the same in words."""
    if (wire.link_bandwidth or wire.link_latency) and edge.bandwidth is None and edge.latency is None:
        bandwidth, latency, default = wire.link_bandwidth or math.inf, wire.link_latency, ""
    else:
        bandwidth, latency = edge.bandwidth or DEFAULT_LINK[0], DEFAULT_LINK[1] if edge.latency is None else edge.latency
        missing = [name for name in ("bandwidth", "latency") if getattr(edge, name) is None]
        default = f", as it declares no {'link' if len(missing) == 2 else missing[0]}," if missing else ""
    rate = "any rate" if math.isinf(bandwidth) else f"{bandwidth / 1e6:g} Mbit/s"
    return bandwidth, latency, f"{rate} and {1000 * latency:g} ms{default}"
