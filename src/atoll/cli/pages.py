"""Errors as a person at the terminal reads them; none of it opens a library."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path
from typing import TextIO

from atoll.errors import AtollError, ManyErrors, PartError
from atoll.registry.parts import Part

_RED, _DIM, _END = "\033[1;31m", "\033[2m", "\033[0m"


def format_error(error: AtollError, *, colour: bool = False) -> str:
    """The page of an error; several errors with an empty line between them and their number below."""
    if isinstance(error, ManyErrors):
        pages = [format_error(one, colour=colour) for one in error.errors]
        return "\n\n".join([*pages, f"{len(pages)} errors; nothing was written"])
    lines = error.page().splitlines()
    if not colour:
        return "\n".join(lines)
    first, rest = lines[0], lines[1:]
    # A label takes the two spaces before it and the ten columns after them.
    return "\n".join([f"{_RED}{first}{_END}", *(f"{_DIM}{line[:12]}{_END}{line[12:]}" for line in rest)])


def print_error(error: AtollError, stream: TextIO) -> None:
    """Write the page to `stream`, in colour on a terminal unless NO_COLOR is set."""
    colour = stream.isatty() and not os.environ.get("NO_COLOR")
    print(format_error(error, colour=colour), file=stream)


def bug_page(error: BaseException, run_dir: Path | None) -> str:
    """A short page for an exception that nobody foresaw; the traceback goes to a file."""
    text = "".join(traceback.format_exception(error))
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f"{Path(last[0].filename).name}, line {last[0].lineno}" if last else "unknown"
    lines = ["error X999: Atoll stopped because of a mistake of its own", f"  where     {place}"]
    lines.append(f"  got       {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}".rstrip())
    lines.append(f"  do        this is a bug; report it with the file {_keep(text, run_dir)}")
    return "\n".join(lines)


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
