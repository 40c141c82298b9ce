"""Inputs that give what was seen: the tokens of a row, tried from left to right, so that the base's own front blocks make the activation.

A causal base makes the state of a position of that token and those before it. So the inverter's guesses are put through the public front
blocks, and where what comes out is not what was seen, the next likeliest tokens are tried: a search over tokens in place of gradients by
embeddings, which it beats where the guesses are good.

Shape suffixes: T positions, D width, K candidates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.attacks.finding import GUESSES, Guessed
from atoll.attacks.inverter import Inverter
from atoll.attacks.views import Front

CANDIDATES, MORE = 24, 256
_SAME = 1e-3
"""Relative distance below which what comes out counts as what was seen, beyond what the codec rounds."""


class Search:
    """For the rows of one setting; `first` is a token that rows may begin with, `noise` what rounding moves an activation, relatively."""

    def __init__(self, front: Front, inverter: Inverter, num_tokens: int, first: int, noise: float) -> None:
        self._front, self._inverter, self._same = front, inverter, _SAME + 2 * noise
        self._alone_VD = front.of_each_token(num_tokens, first)

    def rows(self, rows: Sequence[Tensor], seen: Sequence[Tensor], seconds: float) -> list[Guessed]:
        """As many rows as there is time for, at least one."""
        until, found = time.monotonic() + seconds, list[Guessed]()
        for true_T, seen_TD in zip(rows, seen, strict=True):
            found.append(Guessed(true_T, self.row(seen_TD)))
            if time.monotonic() > until:
                break
        return found

    def row(self, seen_TD: Tensor) -> Tensor:
        """The best tokens of a row whose activations were seen, the best first. Shapes: (T, D) to (T, 5)."""
        candidates_TK = self._inverter.guesses(seen_TD, CANDIDATES)
        ids_T, best_TK = candidates_TK[:, 0].clone(), candidates_TK[:, :GUESSES].clone()
        begin = 0
        while begin < len(ids_T):
            distance_T = _distance(self._front(ids_T[None])[0], seen_TD)
            wrong = (distance_T[begin:] > self._same).nonzero()
            if not len(wrong):
                break
            at = begin + int(wrong[0])
            best_TK[at] = self._position(ids_T[:at], candidates_TK[at], seen_TD[at])
            ids_T[at], begin = best_TK[at, 0], at + 1
        return best_TK

    def _position(self, before_T: Tensor, candidates_K: Tensor, seen_D: Tensor) -> Tensor:
        """The best tokens behind others."""
        made_KD = self._behind(before_T, candidates_K)
        distance_K = _distance(made_KD, seen_D)
        if distance_K.min() > self._same:
            # What the tokens before add is much the same whatever stands here: without it the whole vocabulary can be looked at.
            best = int(distance_K.argmin())
            added_D = made_KD[best] - self._alone_VD[candidates_K[best]]
            more_K = (self._alone_VD + added_D - seen_D).norm(dim=1).topk(min(MORE, len(self._alone_VD)), largest=False).indices
            more_K = more_K[~torch.isin(more_K, candidates_K)]
            if len(more_K):
                candidates_K = torch.cat([candidates_K, more_K])
                distance_K = torch.cat([distance_K, _distance(self._behind(before_T, more_K), seen_D)])
        return candidates_K[distance_K.argsort()[:GUESSES]]

    def _behind(self, before_T: Tensor, candidates_K: Tensor) -> Tensor:
        return self._front(torch.cat([before_T.repeat(len(candidates_K), 1), candidates_K[:, None]], dim=1))[:, -1]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(torch.finfo(b.dtype).tiny)
