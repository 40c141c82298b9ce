"""What came of a run: `atoll evaluate`, `generate` and `merge`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from atoll.cli import loudness
from atoll.cli.options import MODEL, Access, Moved, OtherBase, Output, ReadRun, Run, Sets
from atoll.cli.parsing import command
from atoll.errors import CommandLineError

commands = typer.Typer()


@dataclass(frozen=True, slots=True)
class Subject(ReadRun):
    """What is measured."""

    model: Annotated[str | None, MODEL] = None
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="A PEFT adapter folder to put on the model.")] = None
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", help="Held-out rows; default: those of the run.")] = None

    def __post_init__(self) -> None:
        if (self.run_dir is None) == (self.model is None):
            raise CommandLineError(
                "evaluate takes a run directory or a model", where="atoll evaluate",
                got="neither" if self.model is None else f"{self.run_dir} and --model {self.model}",
                expected="atoll evaluate RUN_DIR, or atoll evaluate --model M [--adapter DIR] [--data DATA]", do="give one of the two",
            )  # fmt: skip
        if self.run_dir is not None and self.adapter is not None:
            raise CommandLineError(
                "--adapter goes with --model", where="atoll evaluate", got=f"{self.run_dir} and --adapter",
                expected="--adapter together with --model", do="leave --adapter away: a run directory has its own",
            )  # fmt: skip


@command(commands)
def evaluate(subject: Subject, *, sets: Sets = None, other_base: OtherBase = False, access: Access, output: Output) -> None:
    """Measure a run, or any model with any adapter.

    Loss, perplexity and the metrics asked for. Give a RUN_DIR that `atoll train` wrote, or --model.
    """
    if subject.run_dir is not None:
        Run(subject.run_dir).check()
    with output.results() as show:
        from atoll.commands.evaluate import evaluate as measure

        with loudness.progress() as progress:
            scores = measure(
                run_dir=subject.run_dir, model=subject.model, adapter=subject.adapter, data=subject.data, overrides=tuple(sets or ()),
                observers=(progress,), host=access.opened(), trust=subject.trust, other_base=other_base,
            )  # fmt: skip
        if output.as_json:
            show(scores)
            return
        from atoll.report.tables import print_table, scores_table

        print_table(scores_table(_score_rows(scores), "held-out rows" if subject.data is None else f"rows of {subject.data}"), sys.stdout)


@command(commands)
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", hidden=True)],
    *,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer.")] = 64,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, metavar="T", help="Draw tokens, the bolder the larger T; 0 does not.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0, max=1, metavar="P", help="Draw from the most likely tokens, P of all together.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Draw others; the same for the same N.")] = None,
    model: Moved = None,
    other_base: OtherBase = False,
    access: Access,
) -> None:
    """Talk to the result.

    RUN_DIR is a folder that `atoll train` wrote; the model goes on from PROMPT, always with the most likely token, unless one of
    --temperature, --top-p and --seed is given.
    """
    given = access.opened()
    run.check()
    from atoll.commands.generate import generate as answer

    more = {"trust": run.trust, "other_base": other_base}
    print(answer(
        run.run_dir, prompt, max_new_tokens=max_new_tokens, host=given, model=model, temperature=temperature, top_p=top_p, seed=seed,
        **more,
    ))  # fmt: skip


@command(commands)
def merge(
    run: Run,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="An absent or empty folder for the merged model.")],
    *,
    dtype: Annotated[
        Literal["as-stored", "fp32", "bf16", "fp16"],
        typer.Option("--dtype", show_default=False, help="Type of the weights; default: as-stored."),
    ] = "as-stored",
    model: Moved = None,
    other_base: OtherBase = False,
) -> None:
    """Base and adapter as one Hugging Face model folder.

    RUN_DIR is a folder that `atoll train` wrote.
    """
    run.check()
    from atoll.commands.merge import merge as write_model

    written = write_model(run.run_dir, out=out, trust=run.trust, other_base=other_base, dtype=dtype, model=model)
    print(f"wrote {written}")


def _score_rows(scores: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float | None]]]:
    """One row for each named set of scores; scores without a name are one row."""
    named: list[tuple[str, Any]] = [(name, value) for name, value in scores.items() if isinstance(value, Mapping)]
    return named or [("model", scores)]
