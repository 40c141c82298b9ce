"""Runs as things: `atoll runs`, with `show`, `compare` and `rm`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.options import Output
from atoll.cli.parsing import command, command_with_commands
from atoll.errors import CommandLineError, RunFolderError
from atoll.units import counted

FolderOfRuns = Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where the runs are.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", hidden=True)]


def runs(
    folder: FolderOfRuns = Path("runs"),
    last: Annotated[int | None, typer.Option("--last", min=1, metavar="N", help="Only those that began last.")] = None,
    *,
    output: Output,
) -> None:
    """The runs of a folder, the last one at the end.

    What they were asked to do, how they ended, and the loss on held-out rows before and after. A RUN below is a folder, or a name in DIR.
    """
    from atoll.report.runs.listing import list_of_runs
    from atoll.report.tables import print_table
    from atoll.runs.shelf import runs_in

    with output.results() as show:
        found = runs_in(folder)[-last if last is not None else None :]
        if output.as_json:
            show([run.to_json() for run in found])
        elif found:
            print_table(list_of_runs(found, f"{counted(len(found), 'run')} in {folder}"), sys.stdout)
        else:
            print(f"no runs in {folder}; `atoll train RUN.toml` writes one")


commands = command_with_commands(runs)


@command(commands)
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", hidden=True)], *, folder: FolderOfRuns = Path("runs"), output: Output
) -> None:
    """One run: what it was asked, what it came to, and what it cost.

    RUN is a folder that `atoll train` wrote, or its name in DIR.
    """
    from atoll.report.runs.listing import edges_of, facts_of
    from atoll.report.tables import comparison_table, print_facts, print_table
    from atoll.runs.record import read_noted, read_record, table
    from atoll.runs.shelf import find_run
    from atoll.runs.summary import read_summary

    found = find_run(run, folder)
    record, (noted, summary) = read_record(found.path), read_noted(found)
    with output.results() as print_json:
        if output.as_json:
            kept = {key: noted.get(key) for key in ("config", "folder", "hashes", "versions")}
            print_json({**record.to_json(), **kept, "summary": summary or None})
            return
        print_facts(record.name, facts_of(record, noted), sys.stdout)
        try:
            scores = comparison_table(read_summary(found.summary_path)) if summary else None
            tables = [scores, edges_of(summary, table(noted.get("config")))]
        except RunFolderError as problem:  # Of another version: what is generic was shown.
            print(f"its scores cannot be shown: {problem.got}")
            tables = []
        for one in filter(None, tables):
            print_table(one, sys.stdout)


@command(commands)
def compare(runs: Runs, *, folder: FolderOfRuns = Path("runs"), output: Output) -> None:
    """Two runs or more side by side.

    Settings that differ, scores, bytes, time and memory. Each RUN is a folder that `atoll train` wrote, or its name in DIR.
    """
    from atoll.report.runs.listing import side_by_side
    from atoll.report.tables import print_table
    from atoll.runs.comparison import compared
    from atoll.runs.shelf import find_run

    if len(runs) < 2:
        raise CommandLineError(
            "one run has nothing to be compared with", where="atoll runs compare", got=str(runs[0]), expected="two runs or more",
            do=f"name another, or use `atoll runs show {runs[0]}`",
        )  # fmt: skip
    comparison = compared([find_run(run, folder) for run in runs])
    with output.results() as print_json:
        if output.as_json:
            print_json(comparison.to_json())
            return
        for one in side_by_side(comparison):
            print_table(one, sys.stdout)


@command(commands)
def rm(
    runs: Runs,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    folder: FolderOfRuns = Path("runs"),
) -> None:
    """Remove runs, with their adapters and checkpoints.

    Each RUN is a folder that `atoll train` wrote, or its name in DIR. One that is going on is refused, and what is no run.
    """
    from atoll.runs.shelf import check_removable, find_run, remove_run

    found = list({run.path.resolve(): run for run in (find_run(one, folder) for one in runs)}.values())
    for run in found:
        check_removable(run)
    if not yes:
        if not sys.stdin.isatty():
            raise CommandLineError(
                "nobody is there to be asked", where="atoll runs rm", got="no terminal", expected="--yes",
                do=f"atoll runs rm --yes {shlex.join(str(run.path) for run in found)}",
            )  # fmt: skip
        for run in found:
            print(run.path, file=sys.stderr)
        which = "this run" if len(found) == 1 else f"these {counted(len(found), 'run')}"
        if not typer.confirm(f"Remove {which} for good?", err=True):
            print("nothing was removed")
            return
    for run in found:
        remove_run(run)
        print(f"removed {run.path}")
