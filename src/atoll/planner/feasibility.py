"""Whether a setting fits an edge's memory, and which smaller one would."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from atoll.cost.formulas import frozen_payload_bytes
from atoll.cost.memory import Memory, training_memory
from atoll.errors import InfeasibleError
from atoll.shapes import BaseShapes
from atoll.units import counted, format_bytes

_LARGEST_BATCH = 1024
_SHORTEST_ROW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Setting:
    """What decides the memory of an edge."""

    shapes: BaseShapes
    ranks: Mapping[str, int]
    bits: int
    batch_size: int
    row_tokens: int
    gradient_checkpointing: bool
    remote_blocks: range = range(0)
    """Blocks that run in a host."""
    merged: Container[str] = ()
    """Modules that may be merged while they are killed; those of blocks in the host cost nothing here."""
    process_bytes: int | None = None
    """What is there before a model, where that is declared."""
    activation_bytes: int | None = None
    """Bytes a number of the precision, where `bits` are those of the blocks' projections alone; None: `bits` are the precision."""
    frozen_delta: Mapping[str, int] = field(default_factory=dict)
    """Ranks of the frozen delta."""
    holds_all: bool = True
    """Whether it is the machine's memory, which holds what a round begins and ends with; not an accelerator's."""

    @property
    def num_label_tokens(self) -> int:
        """All tokens of a batch but the first of each row: the most that can carry loss; of a classifier, one for each row."""
        return self.batch_size * (1 if self.shapes.head else self.row_tokens - 1)

    @property
    def memory(self) -> Memory:
        """The predicted peak by its parts."""
        return training_memory(
            self.shapes, self.ranks, num_rows=self.batch_size, row_tokens=self.row_tokens, num_label_tokens=self.num_label_tokens,
            bits=self.bits, activation_bytes=self.activation_bytes or self.bits // 8,
            gradient_checkpointing=self.gradient_checkpointing, remote_blocks=self.remote_blocks, merged=self.merged,
            frozen_delta=self.frozen_delta, process_bytes=self.process_bytes, holds_all=self.holds_all,
        )  # fmt: skip

    @property
    def peak_bytes(self) -> int:
        """The predicted peak."""
        return self.memory.num_bytes


def largest_batch(setting: Setting, memory_bytes: int) -> int:
    """The largest doubling of the setting's batch that still fits; the setting's own where none does."""
    batch = setting.batch_size
    while 2 * batch <= _LARGEST_BATCH and dataclasses.replace(setting, batch_size=2 * batch).peak_bytes <= memory_bytes:
        batch *= 2
    return batch


def as_written(setting: Setting, memory_bytes: int | None, by_itself: bool) -> str:
    """One line on what run.toml says; gradient checkpointing may have come on by itself, to fit the memory."""
    ranks = sorted(set(setting.ranks.values()))
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    where = f"blocks {setting.remote_blocks.start} to {setting.remote_blocks.stop - 1} in the host; " if setting.remote_blocks else ""
    batch = f"{setting.batch_size} x {counted(setting.row_tokens, 'token')}"
    what = f"{where}rank {span} on {counted(len(setting.ranks), 'module')}, {batch}, as run.toml says"
    if memory_bytes is None:
        return f"{what}; no memory is declared, so that none is a limit"
    if by_itself:
        plain = dataclasses.replace(setting, gradient_checkpointing=False)
        return (
            f"{what}; gradient checkpointing is on, because without it {format_bytes(plain.peak_bytes)} would be needed"
            f" and {format_bytes(memory_bytes)} are declared; {format_bytes(plain.peak_bytes - memory_bytes)} more would switch it off"
        )
    spare = f"{what}; {format_bytes(memory_bytes - setting.peak_bytes)} of the declared memory are left"
    larger = largest_batch(setting, memory_bytes)
    return f"{spare}, enough for batch_size = {larger}" if larger > setting.batch_size else spare


def frozen_delta_in_words(setting: Setting) -> str:
    """What a plan says besides; nothing where there is none."""
    if not setting.frozen_delta:
        return ""
    lying = format_bytes(frozen_payload_bytes(setting.shapes, setting.frozen_delta))
    return f"; costs are those of the last round, in which up to {lying} are in the frozen delta"


def refuse(edges: Sequence[tuple[str, int, Setting]], *, grows: bool = False) -> None:
    """Check each edge's setting against its declared bytes; `grows` where ranks are those of stages.

    Raises: InfeasibleError naming all edges that are too small, what each lacks, and what would make it fit.
    """
    over = [(name, memory_bytes, setting) for name, memory_bytes, setting in edges if setting.peak_bytes > memory_bytes]
    if not over:
        return
    raise InfeasibleError(
        f"too little memory is declared by {len(over)} of {counted(len(edges), 'edge')} with any",
        where=", ".join(f"[[edge]] {name}" for name, _, _ in over),
        got="; ".join(f"{name} declares {format_bytes(memory_bytes)}" for name, memory_bytes, _ in over),
        expected="\n".join(needs(*one) for one in over),
        do="\n".join(f"for {name} {advice(memory_bytes, setting, grows=grows)}" for name, memory_bytes, setting in over),
    )


def needs(name: str, memory_bytes: int, setting: Setting) -> str:
    """What a setting needs, by its parts, and what is missing."""
    memory = setting.memory
    parts = {
        "process": memory.process_bytes, "base": memory.base_bytes, "adapters": memory.adapter_bytes,
        "activations": memory.activation_bytes, "logits": memory.logits_bytes, "one weight made wide": memory.widened_bytes,
        "frozen delta": memory.frozen_delta_bytes,
    }  # fmt: skip
    not_always = ("one weight made wide", "frozen delta")
    listed = ", ".join(f"{part} {format_bytes(size)}" for part, size in parts.items() if size or part not in not_always)
    missing = format_bytes(memory.num_bytes - memory_bytes)
    return f"{name} needs {format_bytes(memory.num_bytes)} ({listed}): {missing} more"


def advice(memory_bytes: int, setting: Setting, *, grows: bool = False) -> str:
    """The least painful change that would make it fit; `grows` where ranks are those of stages."""
    for words, smaller in _smaller(setting, grows=grows):
        if smaller.peak_bytes <= memory_bytes:
            return f"write {words}"
    least = dataclasses.replace(
        setting, batch_size=1, row_tokens=min(setting.row_tokens, _SHORTEST_ROW_TOKENS), gradient_checkpointing=True,
        ranks=dict.fromkeys(setting.ranks, 1),
    )  # fmt: skip
    return f"declare {format_bytes(least.peak_bytes)} or more, if it has that, or choose a smaller base: no setting fits"


def _smaller(setting: Setting, *, grows: bool) -> Iterator[tuple[str, Setting]]:
    """Ever smaller settings, the least painful first."""
    if not setting.gradient_checkpointing:
        setting = dataclasses.replace(setting, gradient_checkpointing=True)
        yield 'gradient_checkpointing = "auto"', setting
    while setting.batch_size > 1:
        setting = dataclasses.replace(setting, batch_size=setting.batch_size // 2)
        yield f"batch_size = {setting.batch_size} (and accumulate more)", setting
    wide = dataclasses.replace(setting, activation_bytes=setting.activation_bytes or setting.bits // 8)
    # A weight that is itself trained cannot be kept in few bits, and what a host holds is not in the edge's.
    widths = () if setting.remote_blocks or any(module.full_weights for module in setting.shapes.modules) else (16, 8, 4)
    for narrow in (dataclasses.replace(wide, bits=bits) for bits in widths if bits < setting.bits):
        # Of a small base the library that quantizes it takes more than it saves.
        if narrow.peak_bytes < setting.peak_bytes:
            setting = narrow
            yield f"batch_size = 1 and bits = {setting.bits}", setting
    width = f", bits = {setting.bits}" if setting.bits < wide.bits else ""
    while setting.row_tokens // 2 >= _SHORTEST_ROW_TOKENS:
        setting = dataclasses.replace(setting, row_tokens=setting.row_tokens // 2)
        yield f"batch_size = 1{width} and max_length = {setting.row_tokens}", setting
    rank = max(setting.ranks.values(), default=1)
    while rank > 1:
        rank //= 2
        setting = dataclasses.replace(setting, ranks={name: min(rank, own) for name, own in setting.ranks.items()})
        lower = f"plan.ranks of at most {rank}" if grows else f"rank = {rank}"
        yield f"batch_size = 1{width}, max_length = {setting.row_tokens} and {lower}", setting
