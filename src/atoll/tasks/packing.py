"""Several short documents in one sequence, kept apart by the attention mask.

Shape suffixes: B sequences, T positions, 1 one mask for all heads.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Documents, as indices, dealt to sequences of `room` tokens: the longest first, each to the fullest sequence that still has room."""
    sequences: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free, (lengths[document], -1))
        if at == len(free):
            space, sequence = room, len(sequences)
            sequences.append([])
        else:
            space, sequence = free.pop(at)
        sequences[sequence].append(document)
        bisect.insort(free, (space - lengths[document], sequence))
    return sequences


def attention_mask(seen_BTT: np.ndarray) -> Tensor:
    """The mask as numbers added to attention scores, which every attention implementation of transformers understands (not so booleans).

    Shapes: bool [B, T, T], whether the second position is seen by the first, to fp32 [B, 1, T, T].
    """
    seen = torch.from_numpy(seen_BTT)
    return torch.zeros(seen.shape, dtype=torch.float32).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]


def documents_seen(document_BT: np.ndarray) -> np.ndarray:
    """Each position sees those before it in its own document, and itself.

    Shapes: document numbers [B, T], to bool [B, T, T].
    """
    causal_TT = np.tri(document_BT.shape[1], dtype=bool)
    return (document_BT[:, :, None] == document_BT[:, None, :]) & causal_TT
