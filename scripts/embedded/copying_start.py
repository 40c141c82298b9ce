"""Initial weights under which a Llama can copy: an induction head drawn by hand into the random start.

A model of this size finds induction by itself only after far more text than a few minutes allow. So some heads of the first block start
as heads that look at the previous token, and as many of the second block as heads that look for the place whose previous token equals the
current one, and say what stands there. Everything stays trainable. The idea of starting from structure that training is known to find is
that of mimetic initialization (Trockman and Kolter 2023, arXiv:2305.09828); the circuit is that of Olsson et al. 2022, arXiv:2209.11895.

Legend: D width, C channels of a head, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

HEADS = 3
"""Heads of each of the two blocks that start with structure."""
POINTER = 7.0
"""Length of query and key, per frequency, of a head that looks one token back."""
POINTER_PAIRS = 5
"""Rotary pairs that point: the fast ones, which tell neighbours apart."""
MATCH = 3.0
"""Gain of queries and keys that compare tokens."""
MATCH_PAIRS = 8
"""Rotary pairs that compare: the slow ones, which distance hardly turns."""
PASS_ON = 0.12
"""Gain with which the previous token is written beside the current one."""
SAY = 1.0
"""Gain with which the token found is written where the head reads it off."""

QUIET = 0.02
"""Factor on the random weights that write to the residual stream."""


@torch.no_grad()
def draw_copying(model: LlamaForCausalLM) -> None:
    """Overwrite HEADS heads of the first two blocks, and give all tokens one direction in common that the pointing heads can use."""
    config = model.config
    width, channels = config.hidden_size, config.hidden_size // config.num_attention_heads
    embedding_VD = model.model.embed_tokens.weight
    for layer in model.model.layers:
        # What random weights write must not drown what the drawn heads write.
        layer.self_attn.o_proj.weight *= QUIET
        layer.mlp.down_proj.weight *= QUIET
    basis_DD = torch.linalg.qr(torch.randn(width, width))[0]
    common_D = basis_DD[0]
    embedding_VD -= (embedding_VD @ common_D)[:, None] * common_D
    embedding_VD += common_D
    first, second = (model.model.layers[block].self_attn for block in (0, 1))
    side_DD = torch.linalg.qr(torch.randn(width, width))[0]
    for head in range(HEADS):
        rows = slice(head * channels, (head + 1) * channels)
        identity_CD = basis_DD[1 + head * channels : 1 + (head + 1) * channels]
        written_CD = side_DD[rows]
        _point_back(first.q_proj.weight[rows], first.k_proj.weight[rows], common_D / math.sqrt(width / 2), config)
        first.v_proj.weight[rows] = identity_CD
        first.o_proj.weight[:, rows] = PASS_ON * written_CD.T
        _compare(second.q_proj.weight[rows], second.k_proj.weight[rows], identity_CD, written_CD)
        second.v_proj.weight[rows] = identity_CD
        second.o_proj.weight[:, rows] = SAY * identity_CD.T


def _point_back(query_CD: Tensor, key_CD: Tensor, common_D: Tensor, config: object) -> None:
    """Constant query and key whose rotary product is largest one token back."""
    half = query_CD.shape[0] // 2
    theta = config.rope_parameters["rope_theta"]  # type: ignore[attr-defined]
    query_CD.zero_()
    key_CD.zero_()
    for pair in range(POINTER_PAIRS):
        angle = theta ** (-pair / half)
        query_CD[pair] = POINTER * common_D
        key_CD[pair] = POINTER * math.cos(angle) * common_D
        key_CD[pair + half] = POINTER * math.sin(angle) * common_D


def _compare(query_CD: Tensor, key_CD: Tensor, identity_CD: Tensor, written_CD: Tensor) -> None:
    """Query of the current token, key of what the pointing head has written: the one before."""
    half = query_CD.shape[0] // 2
    query_CD.zero_()
    key_CD.zero_()
    for number, pair in enumerate(range(half - MATCH_PAIRS, half)):
        for channel, source in ((pair, number), (pair + half, number + MATCH_PAIRS)):
            query_CD[channel] = MATCH * identity_CD[source]
            key_CD[channel] = MATCH * written_CD[source]
