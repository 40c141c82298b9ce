"""The runs of a folder: found, and removed."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from atoll.errors import OutputError, RunFolderError
from atoll.runs.events import hold
from atoll.runs.layout import RunDirectory, entries_of_others, is_half_written, looks_like_a_run
from atoll.runs.record import RunRecord, at, read_record, table

RUNS = Path("runs")
"""Where runs are put that no --out sends elsewhere."""


def runs_in(folder: Path) -> list[RunRecord]:
    """All runs whose folders lie in this one, the one that began last at the end.

    Raises: RunFolderError for a folder that cannot be read, or is itself a run. A `runs` that is not there yet holds none.
    """
    if looks_like_a_run(folder):
        raise RunFolderError(
            "this is a run, not a folder of runs", where=str(folder), got="a run directory", expected="the folder around it",
            do=f"atoll runs show {folder}, or --dir {folder.parent}",
        )  # fmt: skip
    found = [read_record(path) for path in _runs(folder)]
    return sorted(found, key=lambda one: (one.started or "", one.name))


def find_run(given: Path, folder: Path = RUNS) -> RunDirectory:
    """The run that is meant by a path, or by its name in `folder`.

    Raises: RunFolderError naming the run most like it.
    """
    named = folder / given
    for path in (given, *((named,) if given.parent == Path() and not given.exists() else ())):
        if looks_like_a_run(path):
            return RunDirectory(path)
    if given.parent == Path() and not given.exists() and folder.is_dir():
        likely = difflib.get_close_matches(given.name, [path.name for path in _runs(folder)], n=1, cutoff=0.5)
        if likely:
            raise RunFolderError(
                "there is no run of this name", where=str(folder), got=given.name, expected="a run of this folder, or a path to one",
                do=f"did you mean {likely[0]}?",
            )  # fmt: skip
    run = RunDirectory.open(given)  # Says what is wrong with it,
    raise RunFolderError(  # or that it is somebody else's config.json.
        "this is not a run directory", where=str(run.path), got="a folder without config.toml and events.jsonl",
        expected="a folder that `atoll train` wrote", do="give such a folder; `atoll runs` lists them",
    )  # fmt: skip


def check_removable(run: RunDirectory) -> None:
    """Whether a folder is a run's, holds nothing else, and nobody works on it.

    Raises: RunFolderError; ResumeError where a process works on it.
    """
    path = run.path
    if path.is_symlink():
        raise RunFolderError(
            "this is a link to a run", where=str(path), got=f"a link to {path.resolve()}", expected="the run's own folder",
            do="give that folder, or remove the link itself",
        )  # fmt: skip
    noted = table(run.read_config()) if run.config_json.exists() and not is_half_written(path) else {}
    if noted and not (isinstance(at(noted, "config"), dict) and isinstance(at(noted, "folder"), str)):
        raise RunFolderError(
            "this is not a run directory", where=str(run.config_json), got="a config.json that no run wrote",
            expected="a folder that `atoll train` wrote", do="remove it yourself, if you know what it is",
        )  # fmt: skip
    others = entries_of_others(path)
    if others:
        raise RunFolderError(
            "the folder holds what no run writes", where=str(path), got=", ".join(others[:5]) + (", ..." if len(others) > 5 else ""),
            expected="a run and nothing else", do="move that away first, or remove the folder yourself",
        )  # fmt: skip
    if run.events_path.exists():
        with hold(run.events_path):
            pass


def remove_run(run: RunDirectory) -> None:
    """Remove the folder of a run, all of it, or none.

    Raises: as `check_removable`; OutputError where the folder around it cannot be written.
    """
    check_removable(run)
    path = run.path.resolve()
    gone = path.with_name(f".removed-{path.name}-{os.getpid()}")
    try:
        if run.events_path.exists():
            with hold(path / run.events_path.name):
                path.rename(gone)
        else:
            path.rename(gone)
        shutil.rmtree(gone)
    except OSError as problem:
        raise OutputError(
            "the run cannot be removed", where=str(problem.filename or path), got=problem.strerror or str(problem),
            do="mend the permissions of the folder around it, and try again",
        ) from None  # fmt: skip


def _runs(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            yield from (Path(entry.path) for entry in entries if not entry.name.startswith(".") and looks_like_a_run(Path(entry.path)))
    except FileNotFoundError:
        if folder != RUNS:
            raise _unreadable(folder, "nothing there") from None
    except OSError as problem:
        raise _unreadable(folder, problem.strerror or str(problem)) from None


def _unreadable(folder: Path, got: str) -> RunFolderError:
    return RunFolderError(
        "there is no folder of runs", where=str(folder), got=got, expected="a folder with runs in it", do="give another one with --dir"
    )
