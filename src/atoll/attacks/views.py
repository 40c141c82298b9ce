"""The two ends of a base that are not in the host: tokens to the cut, and what leaves the last block to the logits.

Shape suffixes: B rows, T positions, N positions of all rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.base.blocks import Skip, blocks_path, trace
from atoll.base.head import Head, head_of
from atoll.base.skeleton.build import body_of
from atoll.split.host.blocks.middle import shared_view
from atoll.wire.codecs import TensorCodec

CHUNK_TOKENS = 4096
"""Tokens of a forward pass: little memory beside any base."""


class _Reached(Exception):
    """Ends a forward pass that has come to where it was to go."""

    def __init__(self, h_BTD: Tensor) -> None:
        super().__init__()
        self.h_BTD = h_BTD


def _stop_before(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _Reached(arguments[0] if arguments else next(iter(named.values())))


def _stop_behind(_module: nn.Module, _arguments: tuple[Any, ...], out: Any) -> None:
    raise _Reached(out[0] if isinstance(out, tuple) else out)


class Front:
    """From tokens to what enters a module: a block for the cut, or a projection in one; or to what leaves it.

    Adapters that are on the model now stay on this view of it.
    """

    def __init__(self, model: PreTrainedModel, module: str, *, behind: bool = False) -> None:
        self._view: Any = shared_view(model)
        self.device = model.device
        where = self._view.get_submodule(module)
        if behind:
            where.register_forward_hook(_stop_behind)
        else:
            where.register_forward_pre_hook(_stop_before, with_kwargs=True)

    @classmethod
    def at_cut(cls, model: PreTrainedModel, front: int) -> Front:
        """To what enters the first block behind so many."""
        return cls(model, f"{blocks_path(model)}.{front}")

    @classmethod
    def at_end(cls, model: PreTrainedModel) -> Front:
        """To what leaves the last block."""
        path = blocks_path(model)
        return cls(model, f"{path}.{len(model.get_submodule(path)) - 1}", behind=True)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Shapes: (B, T) to (B, T, D), in fp32."""
        try:
            body_of(self._view)(input_ids=ids_BT.to(self.device), use_cache=False)
        except _Reached as reached:
            return reached.h_BTD.detach().float().cpu()
        raise AssertionError("the pass never came there")

    def rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The same for rows of any length, each by itself.

        Shapes: T each to (T, D) each.
        """
        out, start = list[Tensor](), 0
        while start < len(rows):
            width, end = 0, start
            while end < len(rows) and (end == start or max(width, len(rows[end])) * (end - start + 1) <= CHUNK_TOKENS):
                width, end = max(width, len(rows[end])), end + 1
            # Padding on the right is behind all that a causal model looks at.
            ids_BT = torch.zeros(end - start, width, dtype=torch.long)
            for place, row in enumerate(rows[start:end]):
                ids_BT[place, : len(row)] = row
            out += [h_TD[: len(row)] for h_TD, row in zip(self(ids_BT), rows[start:end], strict=True)]
            start = end
        return out

    def of_each_token(self, num_tokens: int, before: int | None = None) -> Tensor:
        """Every token of the vocabulary, at the start of a row of its own, or behind another token.

        Shapes: (V, D).
        """
        ids_V1 = torch.arange(num_tokens)[:, None]
        ids_VT = ids_V1 if before is None else torch.cat([torch.full_like(ids_V1, before), ids_V1], dim=1)
        return torch.cat([self(part)[:, -1] for part in ids_VT.split(CHUNK_TOKENS)])


class Tail:
    """From what leaves the last block to the hidden states that the head reads, and the head."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._view: Any = shared_view(model)
        self._model = model
        self._h_BTD: Tensor | None = None
        blocks: Any = self._view.get_submodule(blocks_path(model))
        returns_tuple = trace(model).returns_tuple
        for number in range(len(blocks)):
            blocks._modules[str(number)] = _Given(self, returns_tuple)

    @property
    def head(self) -> Head:
        """Of the model as it is now."""
        return head_of(self._model)

    def given(self) -> Tensor:
        """What leaves every block here."""
        assert self._h_BTD is not None
        return self._h_BTD

    def __call__(self, h_ND: Tensor) -> Tensor:
        """Differentiable, each position by itself. Shapes: (N, D) in and out."""
        self._h_BTD = h_ND[:, None].to(self._model.dtype)
        dummy_ids = torch.zeros(len(h_ND), 1, dtype=torch.long, device=h_ND.device)
        out: Tensor = body_of(self._view)(input_ids=dummy_ids, use_cache=False).last_hidden_state
        return out[:, 0].float()


class _Given(Skip):
    """In place of a block: what is given, whatever enters."""

    def __init__(self, tail: Tail, returns_tuple: bool) -> None:
        super().__init__(returns_tuple)
        self._given = tail.given

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        """Shapes: (B, T, D) in and out."""
        return super().forward(self._given())


def travelled(codec: TensorCodec, x: Tensor) -> Tensor:
    """What arrives of a tensor: rounded as the codec rounds.

    Shapes: (N, D) in and out.
    """
    data = torch.frombuffer(bytearray(codec.encode(x.contiguous())), dtype=torch.uint8)
    return codec.decode(data, tuple(x.shape), torch.float32, "cpu")
