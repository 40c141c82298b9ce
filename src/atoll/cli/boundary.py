"""The one place where exceptions end and become a page on standard error and an exit status."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import click

from atoll.cli.pages import bug_page, part_error, print_error
from atoll.cli.surroundings import ToldToEnd, UnwritableError, endable, open_streams, silence
from atoll.errors import AtollError, CommandLineError, InputError, PartError, PeerError, PlanError
from atoll.registry.plugins import blamed
from atoll.runs.layout import marked_run

DONE, FAILED, INTERRUPTED = 0, 1, 130
_SIGNALLED = 128
"""A process that a signal ended has this and the signal's number as its status, in shells and here."""
STATUSES: Mapping[int, str] = {
    DONE: "done",
    FAILED: "a mistake of Atoll's own (X999), a failed check, or output that fails",
    InputError.exit_status: "the input is wrong; nothing was written",
    PlanError.exit_status: "the plan is infeasible; nothing was written",
    PeerError.exit_status: "an edge, a host or the coordinator refused or was lost; work is saved",
    INTERRUPTED: "interrupted; work is saved if the page names a run directory",
    _SIGNALLED + signal.SIGTERM: "told to end by SIGTERM (129: by SIGHUP); as 130",
}
"""What a process of Atoll ends with, and what each means."""
_PIPE_CLOSED = 141  # what a shell reports for a process that SIGPIPE ended


class Boundary:
    """A context in which every exception is shown and swallowed; `status` is then what the process should exit with."""

    def __init__(self) -> None:
        self.status = DONE
        self._endable = endable()

    def __enter__(self) -> Self:
        open_streams()
        self._endable.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            if error is not None:
                self.status = _show(error)
            sys.stdout.flush()
        except UnwritableError as problem:
            self.status = _show(problem)
        finally:
            self._endable.__exit__(None, None, None)
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
            if isinstance(error, ToldToEnd):
                print(f"ended by {error.number.name}; {saved}", file=sys.stderr)
                return _SIGNALLED + error.number
            print(f"interrupted; {saved}", file=sys.stderr)
            return INTERRUPTED
        case click.ClickException():
            print_error(_usage(error), sys.stderr)
            return CommandLineError.exit_status
        case SystemExit() if blamed(error) is None:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case UnwritableError():
            silence("stdout")
            if error.errno == errno.EPIPE:  # The reader went away: `atoll plan run.toml | head`, `atoll train run.toml 2>&1 | head`.
                silence("stderr")
                return _PIPE_CLOSED
            print(f"standard output cannot be written: {error.strerror}; what runs write is in their folders", file=sys.stderr)
            return FAILED
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
