"""The one place where exceptions end and become a page on standard error and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import click

from atoll.cli.pages import bug_page, part_error, print_error
from atoll.errors import AtollError, CommandLineError, InputError, PartError, PeerError, PlanError
from atoll.registry.plugins import blamed
from atoll.runs.layout import marked_run

DONE, FAILED, INTERRUPTED = 0, 1, 130
STATUSES: Mapping[int, str] = {
    DONE: "done",
    FAILED: "a mistake of Atoll's own (X999), or a failed check of `atoll doctor`",
    InputError.exit_status: "the input is wrong; nothing was written",
    PlanError.exit_status: "the plan is infeasible; nothing was written",
    PeerError.exit_status: "an edge, a host or the coordinator refused or was lost; work is saved",
    INTERRUPTED: "interrupted; work is saved if the page names a run directory",
}
"""What a process of Atoll ends with, and what each means."""
_PIPE_CLOSED = 141  # what a shell reports for a process that SIGPIPE ended


class Boundary:
    """A context in which every exception is shown and swallowed; `status` is then what the process should exit with."""

    def __init__(self) -> None:
        self.status = DONE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is not None:
            self.status = _show(error)
        return True


def _show(error: BaseException) -> int:
    run_dir = marked_run(error)
    match error:
        case AtollError():
            print_error(error, sys.stderr)
            if isinstance(error, PeerError) and run_dir is not None:
                print(f"work saved in {run_dir}", file=sys.stderr)
            return error.exit_status
        case KeyboardInterrupt() | click.Abort():
            saved = f"work saved in {run_dir}" if run_dir is not None else "nothing was saved"
            print(f"interrupted; {saved}", file=sys.stderr)
            return INTERRUPTED
        case click.ClickException():
            print_error(_usage(error), sys.stderr)
            return CommandLineError.exit_status
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case BrokenPipeError():
            # The reader went away (`atoll plan run.toml | head`); python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _PIPE_CLOSED
        case _ if (part := blamed(error)) is not None:
            print_error(part_error(error, *part, run_dir), sys.stderr)
            return PartError.exit_status
        case _:
            print(bug_page(error, run_dir), file=sys.stderr)
            return FAILED


def _usage(error: click.ClickException) -> CommandLineError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context is not None else "atoll"
    expected = context.get_usage().removeprefix("Usage: ") if context is not None else ""
    what = error.format_message().rstrip(".")
    return CommandLineError(what[:1].lower() + what[1:], where=command, expected=expected, do=f"`{command} --help` says more")
