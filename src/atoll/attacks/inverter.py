"""Tokens from what crosses the cut: by the nearest embedding, and by a network that was trained on public text.

Source: the attacks of BiSR (CCS 2024) and RevertLM (arXiv 2501.05965) in their simplest form.

Shape suffixes: N tokens, D width, V vocabulary, H hidden width, K guesses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHUNK = 512
TRAIN_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Effort:
    """How much an attack may take: whichever ends first."""

    steps: int
    seconds: float


def nearest(h_ND: Tensor, table_VD: Tensor, guesses: int) -> Tensor:
    """The tokens whose embeddings are nearest, the nearest first.

    Shapes: (N, K).
    """
    norms_V = (table_VD**2).sum(1) / 2
    return torch.cat([(h_CD @ table_VD.T - norms_V).topk(guesses).indices for h_CD in h_ND.split(CHUNK)])


class Inverter(nn.Module):
    """Two layers beside a linear map, from a hidden state to an embedding, which is compared with those of all tokens."""

    def __init__(self, table_VD: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("table_VD", nn.functional.normalize(table_VD - table_VD.mean(0), dim=1))
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("scale_D", torch.ones(width))
        inner, out = 2 * width, table_VD.shape[1]
        self.direct = nn.Linear(width, out)
        self.layers = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, out))
        self.sharp = nn.Parameter(torch.tensor(3.0))

    def forward(self, h_ND: Tensor) -> Tensor:
        """Shapes: (N, D) to (N, V)."""
        x_ND = (h_ND - self.mean_D) / self.scale_D  # type: ignore[operator]
        e_ND = nn.functional.normalize(self.direct(x_ND) + self.layers(x_ND), dim=1)
        logits: Tensor = self.sharp.exp() * e_ND @ self.table_VD.T  # type: ignore[operator]
        return logits

    @torch.no_grad()
    def guesses(self, h_ND: Tensor, guesses: int) -> Tensor:
        """The likeliest tokens, the likeliest first. Shapes: (N, K)."""
        return torch.cat([self(h_CD).topk(guesses).indices for h_CD in h_ND.split(CHUNK)])


def trained_inverter(h_ND: Tensor, ids_N: Tensor, table_VD: Tensor, effort: Effort, seed: int) -> Inverter:
    """An inverter trained on hidden states of public text and their tokens."""
    until = time.monotonic() + effort.seconds
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inverter = Inverter(table_VD, h_ND.shape[1])
        inverter.mean_D.copy_(h_ND.mean(0))  # type: ignore[operator]
        inverter.scale_D.copy_(h_ND.std(0) + 1e-6)  # type: ignore[operator]
        optimizer = torch.optim.AdamW(inverter.parameters(), lr=3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=effort.steps)
        for _ in range(effort.steps):
            chosen = torch.randint(len(h_ND), (TRAIN_TOKENS,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(inverter(h_ND[chosen]), ids_N[chosen]).backward()
            optimizer.step()
            schedule.step()
            if time.monotonic() > until:
                break
    return inverter.eval()
