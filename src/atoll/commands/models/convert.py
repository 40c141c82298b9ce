"""atoll convert: a model in a GGUF file, written as the model folder that everything else takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from atoll.base.gguf.convert import Dequantized, dequantized
from atoll.base.headers import gguf_files
from atoll.base.load import quiet
from atoll.commands.models.folder import check_free, written_whole
from atoll.errors import BaseFolderError

ConvertedDtype = Literal["as-stored", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert(source: str | Path, *, out: str | Path, dtype: ConvertedDtype = "as-stored", tokenizer: str | None = None) -> Dequantized:
    """Write what a GGUF file dequantizes to, and its tokenizer, to `out`, whole or not at all.

    `source` is the file, or a folder that holds one. Weights are of the type that most of them have in the file, bf16 where some are in
    blocks of fewer bits, or all of `dtype`. `tokenizer` is a folder or hub id to take instead of the tokenizer that the file describes.

    Raises: BaseFolderError, UnavailableError, WeightsError, ArchitectureError, TokenizerError; OutputError where `out` is not absent or
    empty.
    """
    target = Path(out)
    check_free(target)
    found = dequantized(_the_file(Path(source)), _DTYPES.get(dtype), tokenizer)
    with written_whole(target, "the converted model") as folder:
        with quiet():
            found.model.save_pretrained(folder)
        found.tokenizer.save_pretrained(folder)
    return found


def _the_file(source: Path) -> Path:
    files = gguf_files(source)
    if len(files) != 1:
        raise BaseFolderError(
            "there is no one GGUF file to convert", where=str(source),
            got=", ".join(file.name for file in files[:3]) or ("a folder without one" if source.is_dir() else "nothing there"),
            expected="a GGUF file, or a folder with one", do="give the file itself",
        )  # fmt: skip
    return files[0]
