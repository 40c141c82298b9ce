"""A tiny random model of every family that transformers generates text with, and of the wrappers whose text part people fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

Config = Mapping[str, Any]
_WORDS: Config = {"vocab_size": 272, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_USUAL: Config = {
    **_WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip
_WIDE_HEADS: Config = {**_USUAL, "head_dim": 16}
_GPT: Config = {**_WORDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
_OLD: Config = {**_WORDS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.1}
_OPT: Config = {**_OLD, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
_FOUR: Config = {"num_experts_per_tok": 2, "num_local_experts": 4}
_EXPERTS: Config = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24}
_ROUTED: Config = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT: Config = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
_DELTA: Config = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_WINDOW: Config = {"sliding_window": 8}
_MIXED: Config = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_TIED: Config = {**_WIDE_HEADS, "tie_word_embeddings": True}
_SSM: Config = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_GEMMA3N: Config = {
    **_TIED, **_MIXED, "vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "laurel_rank": 8,
    "num_kv_shared_layers": 0, "intermediate_size": [48] * 3, "activation_sparsity_pattern": [0.0] * 3,
}  # fmt: skip
_FALCON: Config = {**_OLD, "bias": False, "alibi": False}
_STATES: Config = {**_WORDS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "initializer_range": 0.1}
_YARN: Config = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
_LONG: Config = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, Config]] = {
    "llama": ("llama", _USUAL),
    "llama, tied": ("llama", {**_USUAL, "tie_word_embeddings": True}),
    "llama, biases": ("llama", {**_USUAL, "attention_bias": True, "mlp_bias": True}),
    "llama, yarn": ("llama", {**_USUAL, "rope_parameters": _YARN}),
    "llama, dynamic rope": ("llama", {**_USUAL, "max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0,
        "rope_theta": 1e4}}),
    "apertus": ("apertus", _USUAL),
    "arcee": ("arcee", _USUAL),
    "bamba": ("bamba", {**_USUAL, **_SSM, "attn_layer_indices": [1], "mamba_n_groups": 1}),
    "bitnet": ("bitnet", _USUAL),
    "bloom": ("bloom", {**_WORDS, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "codegen": ("codegen", {**_GPT, "n_ctx": 128, "rotary_dim": 4, "tie_word_embeddings": False}),
    "cohere": ("cohere", {**_USUAL, "tie_word_embeddings": True, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**_USUAL, **_WINDOW, "tie_word_embeddings": True, "logit_scale": 0.25}),
    "dbrx": ("dbrx", {
        **_WORDS, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    }),
    "deepseek_v2": ("deepseek_v2", {**_USUAL, **_LATENT, **_ROUTED, "n_group": 2, "topk_group": 1}),
    "deepseek_v3": ("deepseek_v3", {**_USUAL, **_LATENT, **_ROUTED, "n_group": 2, "topk_group": 1}),
    "ernie4_5": ("ernie4_5", _USUAL),
    "ernie4_5_moe": ("ernie4_5_moe", {**_USUAL, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1}),
    "exaone4": ("exaone4", {**_USUAL, **_WINDOW, "sliding_window_pattern": 2}),
    "falcon, 7b": ("falcon", {**_FALCON, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    "falcon, 40b": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, rw": ("falcon", {**_FALCON, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True,
        "alibi": True}),
    "falcon_h1": ("falcon_h1", {**_USUAL, **_SSM, "mamba_d_ssm": 64, "mamba_n_groups": 1}),
    "falcon_mamba": ("falcon_mamba", _STATES),
    "gemma": ("gemma", _TIED),
    "gemma2": ("gemma2", {**_TIED, **_WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", {**_TIED, **_MIXED, "query_pre_attn_scalar": 16}),
    "gemma3n_text": ("gemma3n_text", _GEMMA3N),
    "gemma4_text": ("gemma4_text", {**_TIED, **_MIXED, "vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8,
        "global_head_dim": 16}),
    "glm": ("glm", _WIDE_HEADS),
    "glm4": ("glm4", _WIDE_HEADS),
    "glm4_moe": ("glm4_moe", {**_WIDE_HEADS, **_ROUTED}),
    "gpt2": ("gpt2", _GPT),
    "gpt_bigcode": ("gpt_bigcode", {**_GPT, "multi_query": True}),
    "gpt_neo": ("gpt_neo", {**_WORDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 8, "max_position_embeddings": 128}),
    "gpt_neox": ("gpt_neox", _USUAL),
    "gpt_oss": ("gpt_oss", {**_WIDE_HEADS, **_FOUR, **_WINDOW}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4, "tie_word_embeddings": False}),
    "granite": ("granite", {**_USUAL, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "granitemoe": ("granitemoe", {**_USUAL, **_FOUR, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "granitemoehybrid": ("granitemoehybrid", {**_USUAL, **_FOUR, **_SSM, "shared_intermediate_size": 24, "mamba_expand": 2,
        "layer_types": ["mamba", "attention", "mamba"]}),
    "granitemoehybrid, dense": ("granitemoehybrid", {**_USUAL, "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 48, "mamba_n_heads": 8, "layer_types": ["attention"] * 3, "position_embedding_type": "rope"}),
    "helium": ("helium", {**_USUAL, "head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _WIDE_HEADS),
    "jamba": ("jamba", {**_USUAL, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}),
    "lfm2": ("lfm2", {**_USUAL, "layer_types": ["conv", "full_attention", "conv"]}),
    "llama4_text": ("llama4_text", {**_WIDE_HEADS, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2}),
    "mamba": ("mamba", _STATES),
    "mamba2": ("mamba2", {**_STATES, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1}),
    "minicpm3": ("minicpm3", {**_USUAL, **_LATENT}),
    "minimax_m2": ("minimax_m2", {**_WIDE_HEADS, **_FOUR}),
    "ministral": ("ministral", {**_WIDE_HEADS, **_WINDOW}),
    "ministral3": ("ministral3", _WIDE_HEADS),
    "mistral": ("mistral", {**_USUAL, **_WINDOW}),
    "mixtral": ("mixtral", {**_USUAL, **_FOUR}),
    "mpt": ("mpt", {**_WORDS, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}),
    "nemotron": ("nemotron", _USUAL),
    "olmo": ("olmo", {**_USUAL, "clip_qkv": 8.0}),
    "olmo2": ("olmo2", _USUAL),
    "olmo3": ("olmo3", {**_USUAL, **_WINDOW}),
    "olmoe": ("olmoe", {**_USUAL, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("opt", _OPT),
    "opt, 350m": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "persimmon": ("persimmon", _USUAL),
    "phi": ("phi", {**_USUAL, "num_key_value_heads": 4}),
    "phi3": ("phi3", _USUAL),
    "phi3, longrope": ("phi3", {**_USUAL, "original_max_position_embeddings": 32, "rope_parameters": _LONG}),
    "phimoe": ("phimoe", {**_USUAL, **_FOUR}),
    "qwen2": ("qwen2", _USUAL),
    "qwen2_moe": ("qwen2_moe", {**_USUAL, **_EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}),
    "qwen3": ("qwen3", _WIDE_HEADS),
    "qwen3_moe": ("qwen3_moe", {**_WIDE_HEADS, **_EXPERTS}),
    "qwen3_next": ("qwen3_next", {**_WIDE_HEADS, **_EXPERTS, **_DELTA, "num_hidden_layers": 4, "shared_expert_intermediate_size": 24}),
    "qwen3_5_text": ("qwen3_5_text", {**_WIDE_HEADS, **_DELTA, "num_hidden_layers": 4}),
    "recurrent_gemma": ("recurrent_gemma", {**_USUAL, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16}),
    "rwkv": ("rwkv", {**_WORDS, "hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32, "intermediate_size": 48,
        "context_length": 64}),
    "seed_oss": ("seed_oss", _WIDE_HEADS),
    "smollm3": ("smollm3", {**_USUAL, "no_rope_layers": [1, 1, 0]}),
    "stablelm": ("stablelm", {**_USUAL, "use_qkv_bias": True}),
    "stablelm, parallel": ("stablelm", {**_USUAL, "use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {**_USUAL, **_WINDOW, "use_bias": True}),
    "xglm": ("xglm", {**_WORDS, "d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 128,
        "init_std": 0.1}),
}  # fmt: skip
"""Model type and configuration, by the name of a family or of one of its forms."""

_VISION: Config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 28,
        "patch_size": 14}
WRAPPERS: dict[str, Config] = {
    "gemma3": {"text_config": {**_TIED, **_MIXED, "model_type": "gemma3_text"}, "vision_config": {**_VISION,
        "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
    "gemma3n": {"text_config": _GEMMA3N},
    "llama4": {
        "text_config": FAMILIES["llama4_text"][1],
        "vision_config": {**_VISION, "intermediate_size": 128, "vision_output_dim": 64, "projector_input_dim": 64,
        "projector_output_dim": 64},
    },
    "llava": {"text_config": {**_USUAL, "model_type": "llama"}, "vision_config": {**_VISION, "model_type": "clip_vision_model",
        "projection_dim": 32}},
    "mistral3": {"text_config": {**_USUAL, "model_type": "mistral"}, "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 16}},
    "qwen2_vl": {
        "text_config": {**_USUAL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
    },
    "qwen3_5": {
        "text_config": FAMILIES["qwen3_5_text"][1],
        "vision_config": {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": 14},
    },
}  # fmt: skip
"""Configurations of models that read images beside text, by model type."""
NAMES = (*FAMILIES, *WRAPPERS)


def build(name: str) -> PreTrainedModel:
    """A tiny random model; equal names give equal weights."""
    torch.manual_seed(0)
    if name in WRAPPERS:
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **WRAPPERS[name]))
    else:
        model_type, config = FAMILIES[name]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    for parameter in model.parameters():
        # Some families leave weights as they come out of memory, for a checkpoint to fill.
        if parameter.ndim > 1 and not (torch.isfinite(parameter).all() and parameter.abs().max() < 100):
            parameter.data.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


def save_tokenizer(folder: Path) -> None:
    """One token for each byte, and three special ones."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for character in sorted(ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Bytes()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def save(name: str, folder: Path) -> PreTrainedModel:
    """A model folder as save_pretrained writes it; the model."""
    model = build(name)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model
