"""Load a Hugging Face causal language model and its tokenizer, frozen, from the package, a folder or a hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from atoll.base.head import check_head
from atoll.base.headers import PART, read_part
from atoll.embedded import tiny_path
from atoll.errors import ArchitectureError, BaseFolderError, TokenizerError, WeightsError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# trust_remote_code=False wherever something is loaded: without it, transformers asks at the terminal whether to run the code that a
# config's auto_map names.


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A frozen causal language model in eval mode, with its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    transposed: bool
    """Whether projections keep their weights as (inputs, outputs), as GPT-2's Conv1D does."""

    def digest(self) -> str:
        """SHA-256 over names, shapes and bits of all weights."""
        hasher = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            hasher.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()


def load_base(name: str, *, precision: str = "fp32") -> Base:
    """The base called `name`: "tiny", a folder, or a hub id.

    Raises: BaseFolderError, ArchitectureError, TokenizerError, WeightsError.
    """
    return load_whole(name, precision, quantization=None)


def load_whole(name: str, precision: str, quantization: transformers.BitsAndBytesConfig | None) -> Base:
    """The base with all its blocks, as it lies or quantized while it is loaded.

    Raises: as load_base.
    """
    source = str(tiny_path()) if name == "tiny" else name
    check_folder(source)
    check_whole(source)
    with quiet():
        config = load_config(source)
        tokenizer = load_tokenizer(name)
        model = load_model(source, config, precision, quantization)
    check_vocabulary(source, model, tokenizer)
    check_head(model)
    # The quantizer makes plain projections of GPT-2's transposed ones.
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    return Base(name, model, tokenizer, transposed)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the base called `name`.

    Raises: TokenizerError.
    """
    source = str(tiny_path()) if name == "tiny" else name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, json.JSONDecodeError) as problem:
        raise TokenizerError(
            "the tokenizer cannot be loaded",
            where=source, got=first_line(problem), expected="tokenizer.json and tokenizer_config.json beside the weights",
            do="copy the tokenizer files of the model into the folder",
        ) from None  # fmt: skip
    except Exception as problem:
        # The tokenizers library raises the bare Exception class for a file it cannot parse; anything else is a bug and goes up.
        if type(problem) is not Exception:
            raise
        raise TokenizerError(
            "tokenizer.json cannot be read", where=source, got=first_line(problem), expected="the file as the tokenizers library wrote it",
            do="copy the tokenizer files of the model into the folder again",
        ) from None  # fmt: skip
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise TokenizerError(
            "the tokenizer has no vocabulary", where=source, got=f"{len(tokenizer)} tokens", expected="tokenizer.json with a vocabulary",
            do="copy the tokenizer files of the model into the folder",
        )  # fmt: skip
    return tokenizer


def check_folder(source: str) -> None:
    """Look whether a source that looks like a folder is a model folder.

    Raises: BaseFolderError.
    """
    path = Path(source)
    looks_local = path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if not looks_local or (path / "config.json").is_file():
        return
    if path.is_dir():
        names = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise BaseFolderError(
            "the model folder has no config.json", where=source, got=f"a folder holding {names}",
            expected="config.json, *.safetensors and tokenizer files", do="give the folder that save_pretrained wrote",
        )  # fmt: skip
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*/")] if path.parent.is_dir() else [], n=1)
    raise BaseFolderError(
        "there is no such model folder", where=source, got="a file" if path.exists() else "nothing there",
        expected='"tiny", a model folder, or a hub id such as "org/name"',
        do=f"did you mean {path.parent / near[0]}?" if near else "check the path in [model] base; it is relative to run.toml",
    )  # fmt: skip


def check_whole(source: str) -> None:
    """Look whether a folder holds a whole base.

    Raises: WeightsError for a device's part of one.
    """
    if (Path(source) / PART).is_file():
        (front, back), _ = read_part(Path(source))
        raise WeightsError(
            "the folder holds a part of a base", where=source, got=f"{PART}: {front} blocks at the front and {back} at the back",
            expected="the weights of all blocks", do="use a host, which runs the other blocks (split mode); or give a whole model folder",
        )  # fmt: skip


def load_config(source: str) -> Any:
    """The configuration of a folder or hub id.

    Raises: BaseFolderError, ArchitectureError.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as problem:
        raise BaseFolderError(
            "the model's config.json cannot be used", where=source, got=first_line(problem),
            expected="a model folder, or the id of a model that the hub (or the local cache) has",
            do="check the name; without network, give a local folder",
        ) from None  # fmt: skip
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ArchitectureError(
            "the model is not a causal language model", where=source, got=f"model_type = {config.model_type!r}",
            expected="a decoder such as llama, mistral, qwen2, qwen3, gemma, gpt2, opt, bloom, gpt_neox",
            do="choose a model that generates text from left to right",
        )  # fmt: skip
    return config


def load_model(source: str, config: Any, precision: str, quantization: transformers.BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """The frozen model of a folder or hub id, on the accelerator where there is one.

    Raises: WeightsError.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=DTYPES[precision], output_loading_info=True, use_safetensors=True,
            quantization_config=quantization, device_map=None if quantization is None else {"": device}, trust_remote_code=False,
        )  # fmt: skip
        model, loaded = found
    except (OSError, ValueError, RuntimeError, KeyError) as problem:
        raise weights_error(source, first_line(problem)) from None
    except Exception as problem:
        if "safetensor" not in f"{type(problem).__module__}{type(problem).__name__}".lower():
            raise
        raise weights_error(source, first_line(problem)) from None
    wrong = [*sorted(loaded["missing_keys"])[:3], *(str(key) for key in list(loaded["mismatched_keys"])[:3])]
    if wrong:
        raise weights_error(source, "missing or of another shape: " + ", ".join(wrong))
    model = model.to(device) if quantization is None else model
    return model.eval().requires_grad_(False)


def weights_error(source: str, got: str) -> WeightsError:
    """What is said of weights that do not load."""
    return WeightsError(
        "the model's weights cannot be loaded", where=source, got=got, expected="whole *.safetensors files that match config.json",
        do="copy or download the weights again; .bin weights are converted by save_pretrained(..., safe_serialization=True)",
    )  # fmt: skip


def check_vocabulary(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Look whether the model has a row for every token.

    Raises: TokenizerError.
    """
    embedding: Any = model.get_input_embeddings()
    largest, rows = max(tokenizer.get_vocab().values()), embedding.weight.shape[0]
    if largest >= rows:
        raise TokenizerError(
            "the tokenizer has more tokens than the model", where=source, got=f"token id {largest}", expected=f"ids below {rows}",
            do="use the tokenizer that belongs to the model",
        )  # fmt: skip


def first_line(problem: BaseException) -> str:
    """What an error of a library says, in short."""
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loader's progress bar and load report: what they would say is an error here, or in the event log."""
    level = transformers.logging.get_verbosity()
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()
