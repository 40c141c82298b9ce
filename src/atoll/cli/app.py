"""The command line: its groups, its exit statuses, and the way in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import click
import typer

from atoll.cli import loudness
from atoll.cli.boundary import STATUSES, Boundary
from atoll.cli.groups import fleet, machine, many, models, privacy, results, runs, split, training
from atoll.cli.parsing import Commands, command_with_commands
from atoll.cli.surroundings import check_current_folder
from atoll.errors import CommandLineError


class _Program(Commands):
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit statuses"):
            formatter.write_dl([(str(status), means) for status, means in STATUSES.items()])
        super().format_commands(ctx, formatter)


def _version(asked: bool) -> None:
    if asked:
        from atoll import __version__

        print(f"atoll {__version__}")
        raise typer.Exit


def atoll(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, expose_value=False)] = False,
) -> None:
    """Fine-tune a large language model on private data that stays with its owners."""
    print(context.get_help())


app = command_with_commands(atoll, _Program)
# In the order of the help page.
for _group in (training, many, runs, split, results, privacy, models, machine, fleet):
    app.add_typer(_group.commands)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; nothing is raised."""
    with Boundary() as boundary:
        given = list(sys.argv[1:] if arguments is None else arguments)
        loudness.begin(given)
        check_current_folder()
        command = typer.main.get_command(app)
        parsed = command.main(args=given, prog_name="atoll", standalone_mode=False)
        if isinstance(parsed, int) and parsed:  # While a line is parsed nothing else ends with a status than typer's completion.
            raise CommandLineError(
                "completion is not there for this shell", where=" ".join(["atoll", *given]), expected="bash, zsh, fish or PowerShell",
                do="type it in the shell that is to complete",
            )  # fmt: skip
        status = parsed() if callable(parsed) else parsed
        boundary.status = status if isinstance(status, int) else 0
    return boundary.status
