"""A generation's passes through the middle blocks: only what is new is sent, as long as the host keeps keys and values of what was before.

Shape suffixes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from atoll.remote_blocks import Growth, Layout
from atoll.split.device.exchange import Asked, Exchange, Session

Start = Callable[[Session, Tensor, Asked], Exchange]


class Growing:
    """Rows of one generation: all that has entered the middle blocks stays here, so that it can be sent again, to this host or another.

    `start` begins an exchange; `keeps_back`: blocks behind the middle are here, and need of the first pass what comes out at all positions.
    """

    def __init__(self, growth: Growth, start: Start, *, keeps_back: bool) -> None:
        self.growth, self._start, self._keeps_back = growth, start, keeps_back
        self._h_BTD = torch.empty(0)
        self._padding: list[int] = []
        self._session: Session | None = None
        """The one whose host keeps keys and values."""
        self._rows: list[int] = []
        """Whose they are."""
        self._held, self._total = 0, 0
        """Of so many positions of each, with padding; and how many had entered here by then."""

    def enter(self, h_BTD: Tensor) -> None:
        """What enters the middle blocks in the pass that begins."""
        is_first = not self._padding
        if is_first:
            self._padding = [h_BTD.shape[1] - length for length in self.growth.lengths]
        self._h_BTD = h_BTD if is_first or not self.growth.steps else torch.cat([self._h_BTD, h_BTD], 1)

    def forward(self, session: Session, num_new: int) -> Tensor:
        """What comes out of the middle blocks at the last positions, as many as entered in this pass; zeros where nobody will look.

        Shapes: (B, num_new, D).
        """
        if self._session is session and self._total == self._h_BTD.shape[1] - num_new:
            out_BTD = self._step(session, num_new)
            if out_BTD is not None:
                return out_BTD
        return self._whole(session, num_new)

    def _step(self, session: Session, num_new: int) -> Tensor | None:
        """None where the host no longer has what is needed."""
        rows = self._rows
        asked = Asked(Layout((num_new,) * len(rows)), None, False, False, keep=True, follows=self._held)
        exchange, given_BTD = self._run(session, self._h_BTD[rows, -num_new:], asked, rows)
        if exchange.evicted:
            return None
        out_BTD = given_BTD.new_zeros(len(self.growth.lengths), num_new, given_BTD.shape[-1])
        out_BTD[rows] = given_BTD
        return out_BTD

    def _whole(self, session: Session, num_new: int) -> Tensor:
        rows, total = list(self.growth.open_rows), self._h_BTD.shape[1]
        lengths = [total - self._padding[row] for row in rows]
        # As they cross, rows begin together.
        h_BTD = pad_sequence([self._h_BTD[row, total - length :] for row, length in zip(rows, lengths, strict=True)], batch_first=True)
        ends_N = torch.tensor([place * h_BTD.shape[1] + length - 1 for place, length in enumerate(lengths)], device=h_BTD.device)
        needs_all = self._keeps_back and num_new == total
        asked = Asked(Layout(tuple(lengths)), None if needs_all else ends_N, False, False, keep=self.growth.steps)
        _, given_BTD = self._run(session, h_BTD, asked, rows)
        out_BTD = given_BTD.new_zeros(len(self.growth.lengths), num_new, given_BTD.shape[-1])
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            count = min(length, num_new)
            out_BTD[row, num_new - count :] = given_BTD[place, length - count : length]
        return out_BTD

    def _run(self, session: Session, h_BTD: Tensor, asked: Asked, rows: list[int]) -> tuple[Exchange, Tensor]:
        exchange = self._start(session, h_BTD, asked)
        out_BTD = exchange.forward(h_BTD)
        self._session, self._rows = (session, rows) if exchange.kept else (None, [])
        self._held, self._total = asked.follows + h_BTD.shape[1], self._h_BTD.shape[1]
        return exchange, out_BTD
