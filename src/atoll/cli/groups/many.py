"""Many runs of one run.toml, side by side: `atoll compare` and `sweep`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli import loudness
from atoll.cli.boundary import mark_resume
from atoll.cli.loudness import tell
from atoll.cli.names import method_names
from atoll.cli.options import Method, Output, RunFile, Sets
from atoll.cli.parsing import command
from atoll.cli.showing import program
from atoll.errors import CommandLineError
from atoll.runs.layout import marked_run

commands = typer.Typer()
Seeds = Annotated[list[int] | None, typer.Option("--seeds", min=0, metavar="S ...", help="Seeds to run with; default: the file's.")]
Folder = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder of all these runs; default runs/NAME-compare or NAME-sweep.")
]


def _all_methods() -> list[str]:
    return ["all", *method_names()]


@command(commands, several=("--methods", "--seeds"))
def compare(
    run_file: RunFile,
    methods: Annotated[
        list[str],
        typer.Option("--methods", metavar="M ...", help='Names as of --method; or "all".', autocompletion=_all_methods),
    ],
    *,
    seeds: Seeds = None,
    sets: Sets = None,
    out: Folder = None,
    output: Output,
) -> None:
    """Several methods side by side.

    A run for each method and seed. Those that are finished are not repeated, those that were stopped go on.
    """
    _refuse_seed(sets)
    for name in methods:
        run_file.check((*(() if name == "all" else (f"method={name}",)), *(sets or ())))
    with output.results() as show:
        from atoll.commands.many.compare import compare as run

        with _goes_on():
            compared = run(run_file.config, methods, overrides=sets or (), seeds=seeds or (), out=out, tell=tell, observed=_seen)
        _show(compared, output, show)


@command(commands, several=("--set", "--seeds"))
def sweep(
    run_file: RunFile,
    sets: Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=V ...", help="One value or several; may be repeated.")],
    *,
    method: Method = None,
    seeds: Seeds = None,
    out: Folder = None,
    output: Output,
) -> None:
    """A run for each combination of values of --set.

    Those that are finished are not repeated, those that were stopped go on. Results are shown as by `atoll compare`.
    """
    _refuse_seed(sets)
    before = () if method is None else (f"method={method}",)
    run_file.check(before)
    with output.results() as show:
        from atoll.commands.many.compare import read_settings
        from atoll.commands.many.compare import sweep as run

        settings = read_settings(sets)
        with _goes_on():
            compared = run(run_file.config, settings, overrides=before, seeds=seeds or (), out=out, tell=tell, observed=_seen)
        _show(compared, output, show)


@contextmanager
def _seen() -> Iterator[Any]:
    with loudness.progress() as progress:
        yield progress


@contextmanager
def _goes_on() -> Iterator[None]:
    """The same command goes on with runs that an exception has ended."""
    try:
        yield
    except BaseException as error:
        if marked_run(error) is not None:
            mark_resume(error, shlex.join((*program(), *loudness.typed())))
        raise


def _refuse_seed(sets: Sequence[str] | None) -> None:
    for text in sets or ():
        if text.partition("=")[0].strip() == "run.seed":
            raise CommandLineError(
                "seeds have an option of their own", where=f"--set {text}", got="run.seed", expected="--seeds S ...", do="give --seeds"
            )


def _show(comparison: Any, output: Output, show: Any) -> None:
    if output.as_json:
        show(comparison.to_json())
        return
    from atoll.report.many.comparison import comparison_table
    from atoll.report.tables import print_table

    if not loudness.is_quiet():
        print_table(comparison_table(comparison), sys.stdout)
        for names in comparison.alike:
            print(f"the same adapters, bit for bit: {', '.join(names)}; what sets them apart changes nothing in this run.toml")
    print(f"all of it: {comparison.folder}")
