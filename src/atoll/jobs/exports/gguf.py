"""An adapter as llama.cpp reads it: one GGUF file.

Source: llama.cpp's convert_lora_to_gguf.py (names, metadata), src/llama-adapter.cpp (what is read: one alpha, divided by each pair's own
rank), convert_hf_to_gguf.py (rows of q and k are permuted in the llama architecture, as its rotary embedding turns neighbours).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from atoll.adapters.state import AdapterState
from atoll.errors import UnavailableError
from atoll.jobs.exports.one_rank import outside_blocks

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name for those model types whose projections it has one by one."""
_PERMUTED = "llama"


def why_not(state: AdapterState, model_type: str) -> str | None:
    """What stands against a faithful file for this adapter; None: nothing."""
    if model_type not in ARCHITECTURES:
        return f"the base is a {model_type}, whose projections llama.cpp keeps in a form of its own"
    outside = outside_blocks(tuple(state.ranks), model_type)
    return f"{outside[0]} is no projection in a block, and llama.cpp may share it with another" if outside else None


def write_gguf(state: AdapterState, settings: Mapping[str, Any], path: Path) -> None:
    """Write the adapter, in which all modules are of one rank and scaling; `settings` are those of the base's config.json.

    Raises: UnavailableError without the gguf package.
    """
    try:
        import gguf
    except ImportError as problem:
        raise UnavailableError(
            "a GGUF file needs the library gguf", where=str(path.name), got=str(problem), expected="gguf", do="pip install 'atoll[gguf]'"
        ) from None
    architecture = ARCHITECTURES[settings["model_type"]]
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], settings["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, next(one.scaling * one.rank for one in state.modules.values()))
    for name, pair in state.modules.items():
        heads = _heads(name, settings) if architecture == _PERMUTED else None
        up_OR = pair.up_OR if heads is None else permuted(pair.up_OR, heads)
        for side, tensor in (("lora_a", pair.down_RI), ("lora_b", up_OR)):
            writer.add_tensor(f"{names.get_name(name)}.weight.{side}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(up_OR: Tensor, heads: int) -> Tensor:
    """Rows of each head with its two halves interleaved.

    Shapes: (outputs, rank), likewise.
    """
    return up_OR.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(up_OR.shape)


def _heads(name: str, settings: Mapping[str, Any]) -> int | None:
    all_heads = settings["num_attention_heads"]
    own = {"q_proj": all_heads, "k_proj": settings.get("num_key_value_heads") or all_heads}
    return own.get(name.rpartition(".")[2])
