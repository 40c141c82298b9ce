"""Shared by all tests: tiny random models of every family, made here and never downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import atoll  # noqa: F401  first, because it sets OMP_WAIT_POLICY before torch is imported

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.run_files import PAIR, Sections, write_rows, write_run

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": ROPE,
    "mistral": ROPE,
    "qwen2": ROPE,
    "qwen3": {**ROPE, "head_dim": 8},
    "gemma": {**ROPE, "head_dim": 8},
    "gemma2": {**ROPE, "head_dim": 8},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "pad_token_id": 1, "eos_token_id": 2},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2},
}
SHARED = Path(__file__).resolve().parents[2] / "shared"


def random_model(family: str, num_blocks: int = 2) -> PreTrainedModel:
    """A small model of the family with random weights, in eval mode; equal calls give equal weights."""
    torch.manual_seed(0)
    depth = "n_layer" if "n_layer" in FAMILIES[family] else "num_hidden_layers"
    config = AutoConfig.for_model(family, **FAMILIES[family] | {depth: num_blocks})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start at ones and zeros, which would hide mistakes
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """The name of one model family."""
    return request.param


@pytest.fixture
def family_model(family: str) -> PreTrainedModel:
    """A tiny random model of one family."""
    return random_model(family)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models, where there is one."""
    if not (SHARED / "models").is_dir():
        pytest.skip("../shared with real models and data is absent")
    return SHARED


def save_model_folder(folder: Path, family: str) -> None:
    """A random model with a word tokenizer ("w0" to "w92"), as save_pretrained writes them.

    transformers reads any tokenizer of a Qwen2 folder as byte-level BPE, so that Qwen2 gets one of single characters.
    """
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    if family == "qwen2":
        tokenizer = Tokenizer(BPE({**special, **{character: n + 3 for n, character in enumerate("w0123456789Ġ")}}, []))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    else:
        tokenizer = Tokenizer(WordLevel({**special, **{f"w{n}": n + 3 for n in range(93)}}, unk_token="<pad>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    ).save_pretrained(folder)
    random_model(family).save_pretrained(folder)


def write_job(folder: Path, sections: Sections, edges: Sections = PAIR, *, count: int = 24, owners: Sequence[str] = ()) -> Path:
    """run.toml beside a base and rows, which belong to the edges in turn, unless owners are named."""
    save_model_folder(folder / "base", "llama")
    write_rows(folder / "rows.jsonl", count, owners or tuple(edges) or ("",))
    return write_run(folder, sections, edges)
