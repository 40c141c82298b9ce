"""How the Hugging Face families name their blocks and projections, so that a checkpoint's header tells a model's modules."""

from __future__ import annotations

import re
from dataclasses import dataclass

from atoll.shapes import ModuleKind


@dataclass(frozen=True, slots=True)
class Family:
    """Names within one model type; module names are as in the loaded model."""

    blocks: str
    """Path of the block list. A checkpoint may leave out leading components ("h.0" for "transformer.h.0")."""
    attention: tuple[str, ...]
    """Projections of attention, relative to a block, in the order in which the model holds them."""
    mlp: tuple[str, ...]
    """Projections of the feed-forward part, likewise."""
    embedding: str
    head: str = "lm_head"
    tied: bool = False
    """Whether the head is the embedding where config.json does not say."""
    transposed: bool = False
    """Whether projections keep their weights as (inputs, outputs): GPT-2's Conv1D."""
    classifier: str = "score"
    """The head of the family's sequence classifier, without a bias where `causal`."""
    pooler: str | None = None
    """What stands between the first token's hidden state and that head, if anything."""
    causal: bool = True
    """Whether a token sees only those before it, so that it can generate; else padding needs a mask."""
    keeps_scores: bool = False
    """Whether attention scores are written out (rows x heads x T x T) rather than made in tiles by a fused kernel."""

    def kind_of(self, inner: str) -> ModuleKind:
        """The kind of a module by its name relative to its block."""
        return "attention" if inner in self.attention else "mlp" if inner in self.mlp else guess_kind(inner)

    def position_of(self, inner: str) -> int:
        """Where in its block the model holds this module; unknown ones come last."""
        known = (*self.attention, *self.mlp)
        return known.index(inner) if inner in known else len(known)


def _llama(*, tied: bool = False, keeps_scores: bool = False) -> Family:
    return Family(
        blocks="model.layers",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        embedding="model.embed_tokens",
        tied=tied,
        keeps_scores=keeps_scores,
    )


_FUSED_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_FUSED_SELF_ATTENTION = ("self_attention.query_key_value", "self_attention.dense")

FAMILIES: dict[str, Family] = {
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "gemma": _llama(tied=True),
    "gemma2": _llama(tied=True, keeps_scores=True),
    "gemma3_text": _llama(tied=True),
    "gpt2": Family(
        blocks="transformer.h", attention=("attn.c_attn", "attn.c_proj"), mlp=("mlp.c_fc", "mlp.c_proj"),
        embedding="transformer.wte", tied=True, transposed=True,
    ),
    "opt": Family(
        blocks="model.decoder.layers", mlp=("fc1", "fc2"), embedding="model.decoder.embed_tokens", tied=True,
        attention=("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
    ),
    "bloom": Family(
        blocks="transformer.h", attention=_FUSED_SELF_ATTENTION, mlp=_FUSED_MLP, embedding="transformer.word_embeddings", tied=True,
        keeps_scores=True,
    ),
    "falcon": Family(
        blocks="transformer.h", attention=_FUSED_SELF_ATTENTION, mlp=_FUSED_MLP, embedding="transformer.word_embeddings", tied=True,
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers", attention=("attention.query_key_value", "attention.dense"), mlp=_FUSED_MLP,
        embedding="gpt_neox.embed_in",
    ),
    "phi": Family(
        blocks="model.layers", mlp=("mlp.fc1", "mlp.fc2"), embedding="model.embed_tokens",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
    ),
    "bert": Family(
        blocks="bert.encoder.layer", mlp=("intermediate.dense", "output.dense"), embedding="bert.embeddings.word_embeddings", tied=True,
        attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        head="cls.predictions.decoder", classifier="classifier", pooler="bert.pooler.dense", causal=False,
    ),
    "phi3": Family(
        blocks="model.layers", attention=("self_attn.o_proj", "self_attn.qkv_proj"), mlp=("mlp.gate_up_proj", "mlp.down_proj"),
        embedding="model.embed_tokens",
    ),
}  # fmt: skip
"""By model_type in config.json."""

_ATTENTION_PARTS = frozenset({"attn", "attention", "self_attn", "self_attention"})
_MLP_PARTS = frozenset({"mlp", "feed_forward", "ffn", "feedforward", "fc1", "fc2"})
_NUMBERED = re.compile(r"(?P<blocks>(?:[^.]+\.)*?[^.]+)\.(?P<block>\d+)\.(?P<inner>.+)")


def guess_kind(inner: str) -> ModuleKind:
    """The kind of a module of an unknown family, by the components of its name."""
    parts = set(inner.split("."))
    return "attention" if parts & _ATTENTION_PARTS else "mlp" if parts & _MLP_PARTS else "other"


def locate(tensor: str, family: Family | None) -> tuple[str, int, str] | None:
    """Block list in the loaded model, block number and name within the block; none: the tensor is outside the blocks.

    Source: a checkpoint saved from the bare decoder lacks leading components of the path, never inner ones.
    """
    match = _NUMBERED.fullmatch(tensor)
    if match is None:
        return None
    found, block, inner = match["blocks"], int(match["block"]), match["inner"]
    if family is None:
        return found, block, inner
    same = family.blocks == found or family.blocks.endswith(f".{found}")
    return (family.blocks, block, inner) if same else None
