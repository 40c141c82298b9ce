"""How much a command says: --quiet, --verbose and --json. What is wrong with a command line is told by them, too."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import click

from atoll.errors import CommandLineError

if TYPE_CHECKING:
    from atoll.report.progress import Progress

_LIBRARIES = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")
"""Variables by which libraries are told how much to say, before they open."""


@dataclass(slots=True)
class Loudness:
    """Of the command line that runs now; a process runs one at a time."""

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False
    handler: logging.Handler | None = None
    typed: tuple[str, ...] = ()


_now = Loudness()


def begin(arguments: Sequence[str]) -> None:
    """Forget the command line before. That --json is there is known at once, as this line may be wrong."""
    end()
    _now.typed = tuple(arguments)
    before_values = arguments[: arguments.index("--")] if "--" in arguments else arguments
    _now.quiet, _now.verbose, _now.as_json = False, False, any(word.partition("=")[0] == "--json" for word in before_values)


def end() -> None:
    """Let libraries say as much as they did."""
    logging.disable(logging.NOTSET)
    if _now.handler is not None:
        logging.getLogger().removeHandler(_now.handler)
        logging.getLogger().setLevel(logging.WARNING)
        _now.handler = None


def typed() -> tuple[str, ...]:
    """The command line after the program's name."""
    return _now.typed


def is_quiet() -> bool:
    """Whether nothing is shown but errors and results."""
    return _now.quiet


def is_json() -> bool:
    """Whether a program reads standard output, also where the command fails."""
    return _now.as_json


def tell(line: str) -> None:
    """Show a line that is no result."""
    if not _now.quiet:
        print(line, file=sys.stderr, flush=True)


def aside(line: str) -> None:
    """Show what goes beside a result on standard output: where else to look, what to do next."""
    if not _now.quiet:
        print(line)


def progress() -> Progress:
    """What shows how a run goes on."""
    from atoll.report.progress import Progress

    return Progress("silent" if _now.quiet else "verbose" if _now.verbose else "auto")


def trace(error: BaseException) -> None:
    """With --verbose, where the exception comes from."""
    if _now.verbose and not isinstance(error, CommandLineError | click.ClickException):
        print("".join(traceback.format_exception(error)), file=sys.stderr, end="")


@cache
def options() -> tuple[click.Option, ...]:
    """--quiet and --verbose, which every command has."""
    return (
        click.Option(
            ["-q", "--quiet"], is_flag=True, expose_value=False, callback=_set_quiet, help="Show errors, and what names the result."
        ),
        click.Option(
            ["-v", "--verbose"], is_flag=True, expose_value=False, callback=_set_verbose, help="Show times, library logs, tracebacks."
        ),
    )  # fmt: skip


def _set_quiet(context: click.Context, option: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    _now.quiet = True
    _check_one(context)
    logging.disable(logging.INFO)  # A host's log of what devices do.


def _set_verbose(context: click.Context, option: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    _now.verbose = True
    _check_one(context)
    for name in _LIBRARIES:
        os.environ.setdefault(name, "info")
    _now.handler = logging.StreamHandler(sys.stderr)
    _now.handler.setFormatter(_Formatter("%(elapsed)7.1f s  %(name)s: %(message)s"))
    logging.getLogger().addHandler(_now.handler)
    logging.getLogger().setLevel(logging.INFO)


def _check_one(context: click.Context) -> None:
    if _now.quiet and _now.verbose:
        raise CommandLineError(
            "--quiet and --verbose exclude each other", where=context.command_path, got="both", expected="one of them, or none",
            do="leave one away",
        )  # fmt: skip


class _Formatter(logging.Formatter):
    """Seconds since the command began in place of a date."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self._begun = time.time()

    def format(self, record: logging.LogRecord) -> str:
        record.elapsed = max(0.0, record.created - self._begun)
        return super().format(record)
