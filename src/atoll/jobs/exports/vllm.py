"""What vLLM takes of an adapter: one rank, one scaling, and projections in the blocks of the families named here.

Source: vllm/lora/peft_helper.py (r and lora_alpha count, rank_pattern and alpha_pattern are not read), vllm/config/lora.py (ranks), vllm's
docs/models/supported_models.md (which architectures take adapters).
"""

from __future__ import annotations

from atoll.adapters.state import AdapterState
from atoll.config.document import few
from atoll.errors import AdapterFitError
from atoll.jobs.exports.one_rank import outside_blocks

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""
FAMILIES_WITH_ADAPTERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "opt")
"""Those whose modules vLLM calls as transformers does, of the families whose names are known here."""


def max_rank(state: AdapterState) -> int:
    """What --max-lora-rank has to be for this adapter."""
    rank = max(state.ranks.values())
    return next(one for one in MAX_RANKS if one >= rank)


def check_vllm(state: AdapterState, model_type: str, head: tuple[str, ...], where: str) -> None:
    """Whether vLLM would apply all of this adapter; `head` are a classifier's modules that are trained whole.

    Raises: AdapterFitError.
    """
    wrong = _wrong(state, model_type, head)
    if wrong is not None:
        merged = "export it --for transformers: vLLM serves the merged folder, vllm serve DIR"
        raise AdapterFitError(
            "vLLM would not apply this adapter as it was trained", where=where, got=wrong[0], expected=wrong[1],
            do=merged if state.kind == "lora" else 'train with kind = "lora"',
        )  # fmt: skip


def _wrong(state: AdapterState, model_type: str, head: tuple[str, ...]) -> tuple[str, str] | None:
    if state.kind != "lora":
        return f"an adapter of kind {state.kind!r}", "lora"
    if head:
        return f"a classifier, whose {', '.join(head)} is trained whole", "an adapter of a model that writes text"
    if model_type not in FAMILIES_WITH_ADAPTERS:
        return f"a {model_type}", f"one of {', '.join(FAMILIES_WITH_ADAPTERS)}"
    rank, outside = max(state.ranks.values()), outside_blocks(tuple(state.ranks), model_type)
    if rank > MAX_RANKS[-1]:
        return f"rank {rank}", f"at most {MAX_RANKS[-1]}"
    return (few(outside), "projections in blocks: neither embedding nor head") if outside else None
