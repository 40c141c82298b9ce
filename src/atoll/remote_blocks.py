"""The place in a model whose blocks run in another process: what adapters are put on, and what is told which positions count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What the positions of a forward pass are.

    Shapes: wanted_N and position_ids_BT int64; wanted_N counts flat over rows and positions.
    """

    lengths: tuple[int, ...]
    """Real tokens of each row, which come first; what follows is padding."""
    wanted_N: Tensor | None = None
    """Positions whose final hidden state is needed; None: all."""
    position_ids_BT: Tensor | None = None
    """Positions within each packed document; None: 0, 1, 2, ..."""


@dataclass(slots=True, eq=False)
class Growth:
    """Rows that a generation makes longer. They end together: before a shorter one is padding."""

    lengths: tuple[int, ...]
    """Real tokens of each row in the first pass."""
    steps: bool
    """Whether each pass has only the positions that are new; else all of them."""
    open_rows: tuple[int, ...]
    """Rows whose hidden states are needed still."""


class RemoteBlocksPlaceholder(nn.Module):
    """Stands in a model for blocks that run in another process.

    By full name of a module of theirs: `adapters` holds what is trained beside it here; `killed` what is frozen, and is to be evaluated
    there, or with `merges` merged into its weight.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.sizes: Mapping[str, tuple[int, int]] = dict(sizes)
        self.adapters: dict[str, nn.Module] = {}
        self.killed: dict[str, nn.Module] = {}
        self.merges = False
        self.layout: Layout | None = None
        self.ends_step = True
        """Whether the next backward pass is the last before the optimizer moves what is trained."""
        self.checkpoint = False
        """Whether activations there are computed again in the backward pass."""

    @contextmanager
    def expect(self, layout: Layout) -> Iterator[None]:
        """Forward passes inside have this layout."""
        self.layout = layout
        try:
            yield
        finally:
            self.layout = None

    @contextmanager
    def grow(self, growth: Growth) -> Iterator[None]:
        """Forward passes inside are those of one generation."""
        raise NotImplementedError


def find_placeholder(model: nn.Module) -> RemoteBlocksPlaceholder | None:
    """The placeholder in a model that has one."""
    return next((module for module in model.modules() if isinstance(module, RemoteBlocksPlaceholder)), None)
