"""A model in another format, made a base: `atoll convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from atoll.cli.parsing import command

commands = typer.Typer()


@command(commands)
def convert(
    source: Annotated[Path, typer.Argument(metavar="MODEL.gguf", hidden=True)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="An absent or empty folder for the model.")],
    *,
    dtype: Annotated[
        Literal["as-stored", "fp32", "bf16", "fp16"],
        typer.Option("--dtype", show_default=False, help="Type of the weights; default: as-stored, bf16 for blocks of fewer bits."),
    ] = "as-stored",
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="M", help="Take the tokenizer of this folder or hub id.")] = None,
) -> None:
    """A GGUF file as a model folder, to be a base.

    MODEL.gguf is the file, or a folder with one. Its blocks are dequantized.
    """
    from atoll.commands.models.convert import convert as write_model

    found = write_model(source, out=out, dtype=dtype, tokenizer=tokenizer)
    kept = str(found.model.dtype).removeprefix("torch.")
    print(f"wrote {out}: {found.model.num_parameters():,} numbers in {kept}, from {', '.join(found.kinds)}")
