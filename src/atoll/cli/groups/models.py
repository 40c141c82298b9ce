"""Models in other formats: `atoll export` to servers, `atoll convert` from GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from atoll.cli.loudness import aside, tell
from atoll.cli.options import Moved, OtherBase, Run
from atoll.cli.parsing import command

commands = typer.Typer()


@command(commands)
def export(
    run: Run,
    server: Annotated[Literal["transformers", "vllm", "llama.cpp", "ollama"], typer.Option("--for", help="What is to serve it.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="An absent or empty folder for the model.")],
    *,
    dtype: Annotated[
        Literal["as-stored", "fp32", "bf16", "fp16"] | None,
        typer.Option("--dtype", show_default=False, help="Type of the weights; default: as-stored."),
    ] = None,
    model: Moved = None,
    other_base: OtherBase = False,
) -> None:
    """The result of a run, in the form that a server reads.

    RUN_DIR is a folder that `atoll train` wrote. Writes a model card, too, and shows the commands that serve it.
    """
    run.check()
    from atoll.commands.models.export import export as write

    written = write(run.run_dir, server=server, out=out, dtype=dtype, trust=run.trust, other_base=other_base, model=model)
    for remark in written.remarks:
        tell(f"note: {remark}")
    print(f"wrote {written.folder}: {written.what}")
    for number, line in enumerate(written.commands):
        aside(f"{'' if number else 'next:':8} {line}")


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
