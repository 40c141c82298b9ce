"""Why the library does not open a model's configuration or tokenizer, and what to do: what it says itself may be of something else."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import transformers

from atoll.errors import ArchitectureError, AtollError, BaseFolderError, TokenizerError

_FILES = {"sentencepiece": ("*.model",), "tiktoken": ("*.tiktoken", "tokenizer.model")}
"""What files a library reads from which the tokenizer can be made where there is no tokenizer.json."""


def why_no_config(source: str, problem: Exception) -> AtollError:
    """An error for a config.json that the library does not take."""
    text = _first_line(problem)
    if _wants_code(text):
        return ArchitectureError(
            "the model needs code that comes with it, which is not run here", where=source,
            got="auto_map in config.json, for a model_type that transformers does not have",
            expected=f"a model_type that transformers {transformers.__version__} has itself",
            do="choose a conversion of the model to such a type (many are named -hf), or another model",
        )  # fmt: skip
    if "does not recognize this architecture" in text:
        return ArchitectureError(
            "this version of transformers does not have the model", where=source, got=text.partition(" but ")[0],
            expected=f"a model_type that transformers {transformers.__version__} has",
            do="pip install --upgrade transformers, if a newer one has it; else choose another model",
        )  # fmt: skip
    return BaseFolderError(
        "the model's config.json cannot be used", where=source, got=text,
        expected="a model folder, or the id of a model that the hub (or the local cache) has",
        do="check the name; without network, give a local folder",
    )  # fmt: skip


def why_no_tokenizer(source: str, problem: Exception) -> AtollError:
    """An error for a tokenizer that the library does not open."""
    text, folder = _first_line(problem), Path(source)
    if _wants_code(text):
        return TokenizerError(
            "the tokenizer needs code that comes with it, which is not run here", where=source, got="auto_map in tokenizer_config.json",
            expected="tokenizer.json, or a tokenizer_class that transformers has itself",
            do="take the tokenizer files of a conversion of the model (many are named -hf)",
        )  # fmt: skip
    absent = [name for name in _FILES if find_spec(name) is None]
    wanted = [name for name in absent if name in text or any(folder.glob(pattern) for pattern in _FILES[name])]
    if wanted and not (folder / "tokenizer.json").is_file():
        return TokenizerError(
            "the tokenizer has to be made from a file that takes a library more", where=source, got=f"no {' and no '.join(wanted)} here",
            expected="tokenizer.json, or the library that reads the file", do="pip install 'atoll[tokenizers]'",
        )  # fmt: skip
    return TokenizerError(
        "the tokenizer cannot be loaded", where=source, got=text, expected="tokenizer.json and tokenizer_config.json beside the weights",
        do="copy the tokenizer files of the model into the folder",
    )  # fmt: skip


def _wants_code(text: str) -> bool:
    return "custom code" in text or "trust_remote_code" in text


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
