"""The command line as typed: commands, options, help. What a command does is in actions.py; libraries open there, when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import click
import typer
import typer.core

from atoll.cli import actions
from atoll.cli.boundary import Boundary
from atoll.errors import CommandLineError

# Of the contract, and of later versions: named here so that the answer to typing one is exact.
_LATER = ("resume", "host", "edge", "audit", "report", "watch")
Action = Callable[[], int | None]  # what parsing returns; `main` runs it, so that click never sees what it raises


class Command(typer.core.TyperCommand):
    """A command whose help is plain text: typer 0.20 escapes brackets for rich even when rich does not print them."""

    def get_help(self, ctx: click.Context) -> str:
        """The help page."""
        return super().get_help(ctx).replace("\\[", "[")


class Commands(typer.core.TyperGroup):
    """The group of commands, with our own answer to a name that it does not have."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name.

        Raises: CommandLineError naming the commands there are.
        """
        if args and args[0] not in self.commands:
            raise _no_such_command(args[0], list(self.commands))
        return super().resolve_command(ctx, args)


_WIDE = {"max_content_width": 110}
app = typer.Typer(
    cls=Commands, name="atoll", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=_WIDE
)

# Arguments are described in the commands' docstrings: typer 0.20 loses their help under click 8.5.
ConfigFile = Annotated[Path, typer.Argument(metavar="RUN.toml", hidden=True)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", hidden=True)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Put one value on top of the file; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; nothing is raised."""
    with Boundary() as boundary:
        command = typer.main.get_command(app)
        given = list(sys.argv[1:] if arguments is None else arguments)
        parsed = command.main(args=given, prog_name="atoll", standalone_mode=False)
        status = parsed() if callable(parsed) else parsed
        sys.stdout.flush()
        boundary.status = status if isinstance(status, int) else 0
    return boundary.status


@app.callback(invoke_without_command=True)
def atoll(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Fine-tune a large language model on private data that stays with its owners."""
    if version:
        from atoll import __version__

        print(f"atoll {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command(cls=Command)
def init(directory: Annotated[Path, typer.Argument(metavar="DIR", hidden=True)]) -> Action:
    """Write a commented run.toml and sample data.

    DIR must be absent or empty.
    """
    return partial(actions.init, directory)


@app.command(cls=Command)
def plan(config: ConfigFile, sets: Sets = None, as_json: Json = False) -> Action:
    """What each edge would do, and why; trains nothing.

    Memory, time and bytes by formula, and the limit that binds. No weights are loaded.
    """
    return partial(actions.plan, config, overrides=tuple(sets or ()), as_json=as_json)


@app.command(cls=Command)
def train(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory; default runs/NAME-0001, -0002, ...")] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> Action:
    """Run it: private shards in, one adapter out.

    RUN.toml says what to do; `atoll init` writes one. The run directory holds the adapter as Hugging Face PEFT writes it.
    """
    return partial(actions.train, config, out=out, overrides=tuple(sets or ()), as_json=as_json)


@app.command(cls=Command)
def evaluate(
    run_dir: Annotated[Path | None, typer.Argument(metavar="[RUN_DIR]", hidden=True)] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help='"tiny", a folder, or a Hugging Face id.')] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A PEFT adapter folder to put on the model.")] = None,
    data: Annotated[str | None, typer.Option(metavar="DATA", help="Held-out rows; default: those of the run.")] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> Action:
    """Measure a run, or any model with any adapter.

    Loss, perplexity and the metrics asked for. Give a RUN_DIR that `atoll train` wrote, or --model.
    """
    if (run_dir is None) == (model is None):
        got = "neither" if model is None else f"{run_dir} and --model {model}"
        expected = "atoll evaluate RUN_DIR, or atoll evaluate --model M [--adapter DIR] [--data DATA]"
        what = "evaluate takes a run directory or a model"
        raise CommandLineError(what, where="atoll evaluate", got=got, expected=expected, do="give one of the two")
    if run_dir is not None and adapter is not None:
        expected = "--adapter together with --model"
        do = "leave --adapter away: a run directory has its own"
        raise CommandLineError(
            "--adapter goes with --model", where="atoll evaluate", got=f"{run_dir} and --adapter", expected=expected, do=do
        )
    overrides = tuple(sets or ())
    return partial(actions.evaluate, run_dir=run_dir, model=model, adapter=adapter, data=data, overrides=overrides, as_json=as_json)


@app.command(cls=Command)
def generate(
    run_dir: RunFolder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", hidden=True)],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 64,
) -> Action:
    """Talk to the result.

    RUN_DIR is a folder that `atoll train` wrote; the model goes on from PROMPT.
    """
    return partial(actions.generate, run_dir, prompt, max_new_tokens=max_new_tokens)


@app.command(cls=Command)
def merge(
    run_dir: RunFolder, out: Annotated[Path, typer.Option("--out", metavar="DIR", help="An absent or empty folder for the merged model.")]
) -> Action:
    """Base and adapter as one Hugging Face model folder.

    RUN_DIR is a folder that `atoll train` wrote.
    """
    return partial(actions.merge, run_dir, out=out)


@app.command(cls=Command)
def doctor(as_json: Json = False) -> Action:
    """What this machine has, what would fail, and what to do."""
    return partial(actions.doctor, as_json=as_json)


def _no_such_command(name: str, known: list[str]) -> CommandLineError:
    import difflib

    likely = difflib.get_close_matches(name, known, n=1)
    what = f"`atoll {name}` is not in this version" if name in _LATER else f"there is no command {name!r}"
    do = f"did you mean `atoll {likely[0]}`?" if likely else "`atoll --help` says what each of them does"
    return CommandLineError(what, where="atoll", got=name, expected=f"one of {', '.join(known)}", do=do)
