"""What a setting costs an edge, by formula: memory, FLOPs, bytes and round trips, and from these the time of a round."""

from __future__ import annotations

import math
from dataclasses import dataclass

from atoll.config.schema import PRECISION_BITS, Edge, RunConfig
from atoll.cost.formulas import adapter_payload_bytes, frozen_payload_bytes, message_bytes, round_seconds, step_flops
from atoll.cost.split_traffic import step_bytes, step_round_trips
from atoll.planner.feasibility import Setting


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
            round_trips=1 + num_steps * self.round_trips,
        )  # fmt: skip

    def steps_by(self, deadline: float | None, edge: Edge, most: int) -> int:
        """Steps that the edge can do in so many seconds, at most so many."""
        without, one = self.round_seconds(edge, 0), self.round_seconds(edge, 1)
        if deadline is None or without is None or one is None:
            return most
        if one <= without:
            return most if without <= deadline else 0
        return max(0, min(most, math.floor((deadline - without) / (one - without) * (1 + 1e-12))))


def costs_of(config: RunConfig, setting: Setting, *, accumulate: int, split: bool) -> Costs:
    """Costs of steps of `accumulate` micro-batches each, `split` between the edge and a host or not."""
    wire = step_bytes(
        config, setting.shapes, setting.ranks, num_tokens=accumulate * setting.batch_size * setting.row_tokens,
        num_label_tokens=accumulate * setting.num_label_tokens, num_exchanges=accumulate,
    ).times(int(split))  # fmt: skip
    flops = step_flops(
        setting.shapes, setting.ranks, num_rows=setting.batch_size, row_tokens=setting.row_tokens,
        num_label_tokens=setting.num_label_tokens, gradient_checkpointing=setting.gradient_checkpointing,
        remote_blocks=setting.remote_blocks, frozen=setting.frozen_delta, wire_mode=config.wire.mode,
    ).times(accumulate)  # fmt: skip
    trips = step_round_trips(config, setting.shapes, setting.ranks, num_exchanges=accumulate) if split else 0
    number_bytes = PRECISION_BITS[config.federated.precision] // 8
    return Costs(
        setting.memory.at_training_bytes, adapter_payload_bytes(setting.shapes, setting.ranks, number_bytes), flops.flops,
        wire.up_bytes, wire.down_bytes, trips, frozen_payload_bytes(setting.shapes, setting.frozen_delta, number_bytes),
        2 * message_bytes(setting.shapes, len(setting.ranks)) + message_bytes(setting.shapes, len(setting.frozen_delta)),
    )  # fmt: skip
