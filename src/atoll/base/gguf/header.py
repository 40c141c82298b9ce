"""What a GGUF file says of its model, by the gguf package's reader, and whether transformers' reader takes all of it.

What that reader does not know it leaves out and does not say so: a scaling of positions, a bias, a head count that is the default.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from atoll.errors import ArchitectureError, UnavailableError, WeightsError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those whose logits a test compares."""
BROKEN = (
    OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, ArithmeticError, MemoryError, struct.error,
)  # fmt: skip
"""What the readers raise for a file that is not as it must be."""
_PLAIN = ("F32", "F16", "BF16")
_ROPE_BASE = 10_000.0
"""Of positions, where the file does not say it. Source: llama.cpp, llama_model_base::load_hparams."""
_NEEDED = (
    "context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file."""

    shape: tuple[int, ...]
    """As torch has it: outputs first."""
    kind: str
    """"F32", "Q4_1", ..."""


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in the file but the numbers."""

    file: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def kinds(self) -> dict[str, int]:
        """How many numbers are stored in each way, most first."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.kind] = counts.get(tensor.kind, 0) + math.prod(tensor.shape)
        return dict(sorted(counts.items(), key=lambda one: -one[1]))

    @property
    def plain_kind(self) -> str | None:
        """The type of most numbers; None where some are in blocks."""
        kinds = list(self.kinds)
        return kinds[0] if kinds and set(kinds) <= set(_PLAIN) else None


def read_header(file: Path) -> Header:
    """The header of a file whose architecture is known here.

    Raises: UnavailableError without the gguf package, WeightsError, ArchitectureError.
    """
    try:
        from gguf import GGUFReader
    except ImportError as problem:
        raise UnavailableError(
            "a GGUF file needs the library gguf", where=str(file), got=str(problem), expected="gguf", do="pip install 'atoll[gguf]'"
        ) from None
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {one.name: Tensor(tuple(int(size) for size in reversed(one.shape)), one.tensor_type.name) for one in reader.tensors}
    except BROKEN as problem:
        raise unreadable(file, problem) from None
    _check_is_one_model(file, fields)
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if (said := fields.get(f"{fields['general.architecture']}.block_count")) != len(blocks):
        raise unreadable(file, f"tensors of {len(blocks)} blocks where the header speaks of {said}")
    return Header(file, fields, tensors)


def unreadable(file: Path, problem: object) -> WeightsError:
    """What is said of a file that is not whole, or not GGUF."""
    text = (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
    return WeightsError(
        "the GGUF file cannot be read", where=str(file), got=text, expected="a whole GGUF file, version 2 or 3",
        do="copy or download the file again",
    )  # fmt: skip


def check_config(header: Header, config: Any) -> None:
    """Whether the configuration that the reader made is what the file says: what it does not know it leaves out.

    Raises: ArchitectureError.
    """
    architecture = header.fields["general.architecture"]
    stated = {name.partition(".")[2]: value for name, value in header.fields.items() if name.startswith(f"{architecture}.")}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made = {
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size, "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "attention.key_length": head, "attention.value_length": head,
        "rope.dimension_count": head, "rope.freq_base": config.rope_parameters.get("rope_theta"), "rope.scaling.type": "none",
    }  # fmt: skip
    stated = {"rope.freq_base": _ROPE_BASE} | stated
    for key in (*stated, *_NEEDED):
        if key not in stated or key not in made or not _is_equal(stated[key], made[key]):
            raise ArchitectureError(
                "the GGUF file says of its model what would be lost", where=str(header.file),
                got=f"{architecture}.{key} = {stated.get(key, 'nothing')}",
                expected=f"{made[key]}, which is what is read" if key in made else "no such key",
                do="take the model's own folder of safetensors, from which the GGUF file was made",
            )  # fmt: skip


def check_tensors(header: Header, model: PreTrainedModel) -> None:
    """Whether the file's tensors are the model's, each of its shape and none left over. `model` has no weights yet.

    Raises: WeightsError.
    """
    names: dict[str, str] = get_gguf_hf_weights_map(model, TensorProcessor())
    wanted = {name: tuple(model.state_dict()[ours].shape) for name, ours in names.items()}
    if model.config.tie_word_embeddings:
        wanted.pop("output.weight", None)
    found = {name: tensor.shape for name, tensor in header.tensors.items()}
    wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if wrong:
        raise WeightsError(
            "the tensors of the GGUF file are not those of its model", where=str(header.file),
            got=", ".join(f"{name} {list(found[name]) if name in found else 'missing'}" for name in wrong[:3]),
            expected=", ".join(f"{name} {list(wanted[name])}" if name in wanted else f"no {name}" for name in wrong[:3]),
            do="take the model's own folder of safetensors, from which the GGUF file was made",
        )  # fmt: skip


def _check_is_one_model(file: Path, fields: Mapping[str, Any]) -> None:
    architecture, kind, parts = (fields.get(key) for key in ("general.architecture", "general.type", "split.count"))
    if parts not in (None, 0, 1):
        raise WeightsError(
            "the GGUF file is one of several parts", where=str(file), got=f"split.count = {parts}", expected="one file",
            do="join them with llama.cpp: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )  # fmt: skip
    if architecture not in ARCHITECTURES or kind not in (None, "model"):
        raise ArchitectureError(
            "this GGUF file cannot be converted", where=str(file),
            got=f"general.architecture = {architecture!r}" + ("" if kind in (None, "model") else f", general.type = {kind!r}"),
            expected=f"a model of {', '.join(ARCHITECTURES[:-1])} or {ARCHITECTURES[-1]}",
            do="take the model's own folder of safetensors, from which the GGUF file was made",
        )  # fmt: skip


def _is_equal(stated: object, made: object) -> bool:
    if isinstance(stated, float) and isinstance(made, int | float):
        return math.isclose(stated, made, rel_tol=1e-6)
    return stated == made
