"""Errors as a person at the terminal reads them; none of it opens a library."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import traceback
from pathlib import Path
from typing import TextIO

from atoll.errors import AtollError, ManyErrors, PartError
from atoll.registry.parts import Part
from atoll.units import counted

_RED, _DIM, _END = "\033[1;31m", "\033[2m", "\033[0m"
_LABEL_COLUMNS = 12
"""The two spaces before a label, and the ten columns that it takes."""
_COLOUR = re.compile(r"\033\[[0-9;]*m")
_LABEL = re.compile(r"(?:\033\[[0-9;]*m)? {2}[a-z ]{10}(?:\033\[[0-9;]*m)?")
_COMMAND = re.compile(r"(?:\S*/)?(?:atoll|pip) ")
_UNBROKEN = re.compile(r"(?:`[^`]*`|\S)+")


def format_error(error: AtollError, *, colour: bool = False) -> str:
    """The page of an error; several errors with an empty line between them and their number below."""
    if isinstance(error, ManyErrors):
        pages = [format_error(one, colour=colour) for one in error.errors]
        return "\n\n".join([*pages, f"{counted(len(pages), 'error')}; nothing was written"])
    lines = error.page().splitlines()
    if not colour:
        return "\n".join(lines)
    first, rest = lines[0], lines[1:]
    labelled = (f"{_DIM}{line[:_LABEL_COLUMNS]}{_END}{line[_LABEL_COLUMNS:]}" for line in rest)
    return "\n".join([f"{_RED}{first}{_END}", *labelled])


def print_error(error: AtollError, stream: TextIO) -> None:
    """Write the page to `stream`; on a terminal in colour, unless NO_COLOR is set, and in lines that end between words."""
    page = format_error(error, colour=stream.isatty() and not os.environ.get("NO_COLOR"))
    print(_wrapped(page, shutil.get_terminal_size().columns) if stream.isatty() else page, file=stream)


def _wrapped(page: str, columns: int) -> str:
    """What is to be typed, between backticks or as a whole line, stays on one line of its own, so that it can be copied."""
    return "\n".join(_wrapped_line(line, columns) for line in page.split("\n"))


def _wrapped_line(line: str, columns: int) -> str:
    label = _LABEL.match(line)
    head = label[0] if label else ""
    if _COMMAND.match(line[len(head) :]):
        return line
    lines, width = [head], len(_COLOUR.sub("", head))
    for word in _UNBROKEN.findall(line[len(head) :]):
        long = len(_COLOUR.sub("", word))
        is_first = lines[-1] == head or not lines[-1].strip()
        if not is_first and width + 1 + long > columns:
            lines.append(" " * _LABEL_COLUMNS)
            width, is_first = _LABEL_COLUMNS, True
        lines[-1] += word if is_first else f" {word}"
        width += long + (not is_first)
    return "\n".join(lines)


class Bug(AtollError):
    """A mistake of Atoll's own."""

    code = "X999"


def bug(error: BaseException, run_dir: Path | None) -> Bug:
    """The page of an exception that nobody foresaw; the traceback goes to a file."""
    text = "".join(traceback.format_exception(error))
    last, said = traceback.extract_tb(error.__traceback__)[-1:], str(error).splitlines()
    return Bug(
        "Atoll stopped because of a mistake of its own",
        where=f"{Path(last[0].filename).name}, line {last[0].lineno}" if last else "unknown",
        got=f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__,
        do=f"this is a bug; report it with the file {_keep(text, run_dir)}",
    )  # fmt: skip


def as_values(error: AtollError) -> dict[str, object]:
    """An error for programs: its parts, null where one is not known, its code and the exit status; of several, each in `errors`."""
    parts = {name: getattr(error, name) or None for name in ("code", "what", "where", "got", "expected", "do")}
    several = {"errors": [as_values(one) for one in error.errors]} if isinstance(error, ManyErrors) else {}
    return {**parts, "status": error.exit_status, **several}


def part_error(error: BaseException, part: Part, place: str, run_dir: Path | None) -> PartError:
    """The page of an exception from somebody else's part; the traceback goes to a file."""
    said, file = str(error).splitlines(), _keep("".join(traceback.format_exception(error)), run_dir)
    got = f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__
    return PartError(
        f"the {part.kind.name} {part.name} failed", where=place, got=got, expected="what its kind must do",
        do=f"mend it; the whole traceback is in {file}",
    )  # fmt: skip


def _keep(text: str, run_dir: Path | None) -> Path:
    if run_dir is not None and run_dir.is_dir() and os.access(run_dir, os.W_OK):
        path = run_dir / "traceback.txt"
        path.write_text(text, encoding="utf-8")
        return path
    with tempfile.NamedTemporaryFile("w", prefix="atoll-traceback-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(text)
    return Path(file.name)
