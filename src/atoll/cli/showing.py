"""What more than one command shows."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atoll.cli import loudness
from atoll.cli.boundary import mark_resume
from atoll.cli.options import Access, Output
from atoll.registry.parts import loaded
from atoll.runs.layout import RunDirectory, marked_run
from atoll.runs.record import read_noted


def program() -> tuple[str, ...]:
    """What has to be typed to call this program: its name, or, where the shell would find another or none, where it lies."""
    called, found = Path(sys.argv[0]), shutil.which("atoll")
    if called.name == "__main__.py" and called.parent.name == "atoll":
        return (sys.executable, "-m", "atoll")
    is_other = called.name == "atoll" and called.is_file() and (found is None or not called.samefile(found))
    return (sys.argv[0],) if is_other else ("atoll",)


def show_training(run: Callable[[Any], Any], access: Access, output: Output, options: Sequence[str] | None) -> None:
    """Run it with a progress bar as its observer, and show the comparison, the adapter, and what to try next.

    `options`: those with which `atoll resume` goes on with this run, should it not end; None: it cannot.
    """
    with output.results() as show:
        with loudness.progress() as progress:
            result = _run(run, progress, options)
        if output.as_json:
            show({**result.summary.to_json(), "run_dir": str(result.run_dir), "adapter": str(result.adapter)})
            return
        if not loudness.is_quiet():
            _show_scores(result)
        print(f"adapter: {result.adapter}")
        if result.figures:
            loudness.aside(f"figures: {result.figures[0].parent}")
        loudness.aside(f"next:    {shlex.join(_next(result, access))}")


def _run(run: Callable[[Any], Any], progress: Any, options: Sequence[str] | None) -> Any:
    try:
        return run(progress)
    except BaseException as error:
        if options is not None and (run_dir := marked_run(error)) is not None:
            trust = ("--trust",) if _names_others_code(run_dir) else ()
            mark_resume(error, shlex.join((*program(), "resume", str(run_dir), *options, *trust)))
        raise


def _names_others_code(run_dir: Path) -> bool:
    """Whether a run of this process names a part that is somebody else's."""
    config = json.dumps(read_noted(RunDirectory(run_dir))[0].get("config"), ensure_ascii=False)
    return any(json.dumps(part.name, ensure_ascii=False) in config for part in loaded())


def _show_scores(result: Any) -> None:
    from atoll.report.tables import comparison_table, personal_table, print_table

    table = comparison_table(result.summary)
    if table is None:
        print("scores:  none, as no rows are held out")
    for one in (table, personal_table(result.summary)):
        if one is not None:
            print_table(one, sys.stdout)


def _next(result: Any, access: Access) -> tuple[str, ...]:
    from atoll.commands.train import example_prompt

    prompt = example_prompt(result.run_dir)
    if prompt is None:
        return (*program(), "evaluate", str(result.run_dir))
    return (*program(), "generate", str(result.run_dir), prompt, *access.given())
