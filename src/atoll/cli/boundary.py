"""The one place where exceptions end and become a page on standard error and an exit status."""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import click

from atoll.cli import loudness
from atoll.cli.pages import as_values, bug, part_error, print_error
from atoll.cli.surroundings import ToldToEnd, UnwritableError, endable, open_streams, silence
from atoll.errors import AtollError, CommandLineError, InputError, PeerError, PlanError
from atoll.registry.plugins import blamed
from atoll.runs.checkpoints import latest_checkpoint
from atoll.runs.layout import RunDirectory, marked_run

DONE, FAILED, INTERRUPTED = 0, 1, 130
_SIGNALLED = 128
"""A process that a signal ended has this and the signal's number as its status, in shells and here."""
STATUSES: Mapping[int, str] = {
    DONE: "done",
    FAILED: "a mistake of Atoll's own (X999), a failed check, or output that fails",
    InputError.exit_status: "the input is wrong; nothing was written",
    PlanError.exit_status: "the plan is infeasible; nothing was written",
    PeerError.exit_status: "an edge, a host or the coordinator refused or was lost",
    INTERRUPTED: "interrupted; of this and 4 the last line says what is saved",
    _SIGNALLED + signal.SIGTERM: "told to end by SIGTERM (129: by SIGHUP); as 130",
}
"""What a process of Atoll ends with, and what each means."""
_RESUME = "go on with: "
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


def mark_resume(error: BaseException, command: str) -> None:
    """Note on an exception that ends a run what goes on with it, as it is typed."""
    error.add_note(f"{_RESUME}{command}")


def _show(error: BaseException) -> int:
    run_dir = marked_run(error)
    match error:
        case AtollError():
            return _ended(error, error)
        case KeyboardInterrupt() | click.Abort():
            if isinstance(error, ToldToEnd):
                return _stopped(error, f"ended by {error.number.name}", _SIGNALLED + error.number)
            return _stopped(error, "interrupted", INTERRUPTED)
        case click.ClickException():
            return _ended(error, _usage(error))
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
            return _ended(error, part_error(error, *part, run_dir))
        case _:
            return _ended(error, bug(error, run_dir))


def _ended(error: BaseException, page: AtollError) -> int:
    """Show the page of an exception; a program that reads standard output gets its parts there."""
    loudness.trace(error)
    print_error(page, sys.stderr)
    run_dir, said = marked_run(error), _saved(error)
    if said:
        print(said, file=sys.stderr)
    _give(error, run_dir, as_values(page))
    return page.exit_status


def _stopped(error: BaseException, how: str, status: int) -> int:
    loudness.trace(error)
    said = _saved(error)
    print(f"{how}; {said or 'nothing was saved'}", file=sys.stderr)
    _give(error, marked_run(error), {**as_values(AtollError(how)), "status": status})
    return status


def _give(error: BaseException, run_dir: Path | None, values: dict[str, object]) -> None:
    if loudness.is_json():
        whole = None if run_dir is None else latest_checkpoint(RunDirectory(run_dir))
        where = {"run_dir": run_dir and str(run_dir), "checkpoint": whole and str(whole), "resume": _resume(error)}
        print(json.dumps({**values, **where}, indent=2), file=sys.stdout)


def _saved(error: BaseException) -> str:
    """Where the work is that an exception has ended, and what goes on with it; "" where no run had begun."""
    run_dir, resume = marked_run(error), _resume(error)
    if run_dir is None:
        return ""
    whole = latest_checkpoint(RunDirectory(run_dir))
    saved = f"no round of {run_dir} was saved yet" if whole is None else f"work saved in {run_dir}, up to {whole.name}"
    return saved if resume is None else f"{saved}; {'begin again' if whole is None else 'go on'} with\n  {resume}"


def _resume(error: BaseException) -> str | None:
    return next((note.removeprefix(_RESUME) for note in getattr(error, "__notes__", ()) if note.startswith(_RESUME)), None)


def _usage(error: click.ClickException) -> CommandLineError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context is not None else "atoll"
    expected = context.get_usage().removeprefix("Usage: ") if context is not None else ""
    what = " ".join(error.format_message().split()).rstrip(".")  # Click lists choices with a tab before each.
    return CommandLineError(what[:1].lower() + what[1:], where=command, expected=expected, do=f"`{command} --help` says more")
