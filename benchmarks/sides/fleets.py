"""Methods side by side on fleets: what each one writes over a task's run.toml, and the two fleets of five."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONTEXT = "300 MB"
"""What an accelerator's context takes before there is a model; the rest of an edge's memory is for the model."""
TOTAL_GFLOPS = 115.0


@dataclass(frozen=True, slots=True)
class Machine:
    """One edge."""

    name: str
    model_megabytes: float
    gflops: float
    mbits: float

    def to_toml(self) -> str:
        """As a section of a fleet file."""
        return (
            f'[[edge]]\nname = "{self.name}"\nmemory = "{300 + self.model_megabytes:g} MB"\nprocess_memory = "{CONTEXT}"\n'
            f'flops = "{self.gflops:g} GFLOP/s"\nbandwidth = "{self.mbits:g} Mbit/s"\nlatency = "20 ms"\n'
        )


NAMES = ("one", "two", "three", "four", "five")
FLEETS: Mapping[str, Sequence[Machine]] = {
    # Memory, speed and link spread 1 to 4; the smallest cannot hold rank 8 on every weight of an unquantized base.
    "heterogeneous": tuple(
        Machine(name, megabytes, gflops, mbits)
        for name, megabytes, gflops, mbits in zip(NAMES, (14, 21, 28, 42, 56), (10, 15, 20, 30, 40), (20, 30, 40, 60, 80), strict=True)
    ),
    "homogeneous": tuple(Machine(name, 32.2, TOTAL_GFLOPS / 5, 46) for name in NAMES),
}


@dataclass(frozen=True, slots=True)
class Method:
    """A way of fine-tuning over a fleet."""

    name: str
    overrides: tuple[str, ...]
    ranks: tuple[int, ...] | None = None
    """Of the edges, from the smallest up, where the method gives each its own by its capability."""
    is_lora_on_equals: bool = False
    """Whether nothing but unequal ranks tells it from plain LoRA."""

    def all_overrides(self, fleet: str) -> list[str]:
        """Everything it writes over run.toml."""
        if self.ranks is None:
            return list(self.overrides)
        ranks = self.ranks if fleet == "heterogeneous" else (self.ranks[len(self.ranks) // 2],) * len(self.ranks)
        return [*self.overrides, *(f"edge.{name}.rank={rank}" for name, rank in zip(NAMES, ranks, strict=True))]


# What has no planner passes one row at a time, so that as many edges as possible can hold it.
PLAIN = ("model.quantize=16", "train.batch_size=1", "train.accumulate=2")
BY_CAPABILITY = (2, 4, 8, 8, 16)
# What is stacked lies beside the base here, as a base of few bits cannot take it in: nobody but the largest edge could hold it. Whole
# weights with their moments fit nobody.
UNLIMITED = tuple(f"edge.{name}.memory=1 GB" for name in NAMES)
PLANNED = ("run.placement=local", "plan.warmup_steps=2")
LORA, FEDPIPE = "LoRA, one rank", "FedPipe"
METHODS = (
    Method(LORA, ("method=lora", *PLAIN)),
    Method("LoRA, one rank, 4 bits", ("method=lora", "model.quantize=4", "adapter.rank=2", *PLAIN[1:])),
    Method("HetLoRA (zero-pad)", ("method=hetlora", *PLAIN), BY_CAPABILITY),
    Method("FLoRA (stack), memory not counted", ("method=flora", *PLAIN, *UNLIMITED), BY_CAPABILITY),
    Method("FlexLoRA (svd)", ("method=flexlora", *PLAIN), BY_CAPABILITY, is_lora_on_equals=True),
    Method("FedAdapter", ("method=fedadapter", *PLAIN, "plan.ranks=[2,4,8]")),
    Method("vanilla fine-tuning", ("method=full", *PLAIN[1:])),
    Method("vanilla fine-tuning, memory not counted", ("method=full", *PLAIN[1:], *UNLIMITED)),
    Method(FEDPIPE, ("method=fedpipe", *PLANNED)),
)
ABLATIONS = (
    Method("FedPipe without importance", ("method=fedpipe-without-importance", *PLANNED)),
    Method("FedPipe with all blocks", ("method=fedpipe-without-depth", *PLANNED)),
    Method("FedPipe without ranks", ("method=fedpipe-without-ranks", *PLANNED)),
    Method("FedPipe without quantization", ("method=fedpipe-without-quantization", *PLANNED)),
    Method("FedPipe without filled rounds", ("method=fedpipe-without-filling", *PLANNED)),
    Method("FedPipe, adapters travel in fp32", ("method=fedpipe", *PLANNED, "federated.precision=fp32")),
    Method("FedPipe, steps weigh as well", ("method=fedpipe", *PLANNED, "federated.weigh=steps")),
)


def fleet_toml(fleet: str) -> str:
    """The fleet's file."""
    return "\n".join(machine.to_toml() for machine in FLEETS[fleet])
