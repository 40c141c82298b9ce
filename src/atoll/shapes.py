"""The modules of a base that can carry an adapter, as sizes and names only: what planning, targets and formulas share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

ModuleKind = Literal["attention", "mlp", "other"]

_OUTPUT_PROJECTIONS = frozenset({"o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "dense_4h_to_h", "wo", "w2", "proj"})


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """One linear projection inside a block of the base."""

    name: str
    """Full dotted name in the model, "model.layers.0.self_attn.q_proj"."""
    d_in: int
    d_out: int
    kind: ModuleKind
    block: int
    """Which block of the base it belongs to, from 0."""
    full_weights: bool = False
    """Whether its weight itself is trained, and not an adapter beside it."""
    outside: Literal["", "embedding", "head"] = ""
    """What it is where it is in no block: its weight counts with what blocks do not have, `block` is one below or above theirs."""

    @property
    def last_name(self) -> str:
        """The last component of the name, "q_proj"."""
        return self.name.rpartition(".")[2]

    @property
    def stage(self) -> int:
        """Place in its block's computation: 0 into attention, 1 out of it, 2 into the feed-forward part, 3 out of it.

        Modules of one block and stage read the same input.
        """
        return _stage(self.kind, self.name)

    @property
    def num_weights(self) -> int:
        """Entries of the weight matrix, without the bias; of a module outside of the blocks none."""
        return 0 if self.outside else self.d_in * self.d_out

    def num_adapter_parameters(self, rank: int) -> int:
        """Trainable numbers of an adapter of this rank: rank * (d_in + d_out); of a full weight, at any rank, all."""
        return self.num_weights * bool(rank) if self.full_weights else rank * (self.d_in + self.d_out)


@lru_cache(2**16)
def _stage(kind: ModuleKind, name: str) -> int:
    # A planner asks millions of times.
    leaves = name.rpartition(".")[2] in _OUTPUT_PROJECTIONS and not name.endswith(".intermediate.dense")
    return (0 if kind == "attention" else 2) + leaves


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """What planning needs to know of a base."""

    model_type: str
    num_parameters: int
    """As loaded: a head that is the embedding counts once."""
    modules: tuple[ModuleShape, ...]
    """Every linear projection inside the blocks, in the model's order; head and embedding only where they are targets."""
    d_model: int
    vocab_size: int
    num_blocks: int
    max_positions: int | None
    """None where positions are relative and the configuration sets no bound."""
    tied_head: bool
    stored_bytes_per_weight: float
    num_heads: int
    attention_width: int
    """Heads times the width of one."""
    keeps_scores: bool
    """Whether attention scores are held in memory (heads x T x T a row)."""
    head: tuple[ModuleShape, ...] = ()
    """Of a classifier, what lies between the blocks and the classes; trained where `full_weights` says so. Empty: it predicts tokens."""
    head_biases: bool = False
    """Whether these have biases."""
    outside: tuple[ModuleShape, ...] = ()
    """Embedding and head, where an adapter could be put on them."""

    @property
    def num_head_parameters(self) -> int:
        """Numbers of the head that are trained."""
        return sum(module.num_weights + module.d_out * self.head_biases for module in self.head if module.full_weights)


def with_outside(shapes: BaseShapes, names: Collection[str]) -> BaseShapes:
    """The same base, whose embedding and head, where they are named, are modules as others are."""
    chosen = {module.outside: module for module in shapes.outside if module.name in names}
    first, last = ([chosen[kind]] if kind in chosen else [] for kind in ("embedding", "head"))
    return replace(shapes, modules=(*first, *shapes.modules, *last))


def with_full_weights(shapes: BaseShapes) -> BaseShapes:
    """The same base, of whose modules the weights themselves are trained."""
    return replace(shapes, modules=tuple(replace(module, full_weights=True) for module in shapes.modules))
