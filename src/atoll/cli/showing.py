"""What more than one command shows."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoll.cli.options import Access, Output


def tell(line: str) -> None:
    """Show a line that is no result."""
    print(line, file=sys.stderr, flush=True)


def program() -> str:
    """What has to be typed to call this program: its name, or where it lies if the shell would not find it."""
    called = sys.argv[0]
    return called if shutil.which("atoll") is None and Path(called).name == "atoll" else "atoll"


def show_training(run: Callable[[Any], Any], access: Access, output: Output) -> None:
    """Run it with a progress bar as its observer, and show the comparison, the adapter, and what to try next."""
    with output.results() as show:
        from atoll.report.progress import Progress

        with Progress() as progress:
            result = run(progress)
        if output.as_json:
            show({**result.summary.to_json(), "run_dir": str(result.run_dir), "adapter": str(result.adapter)})
            return
        from atoll.report.tables import comparison_table, personal_table, print_table

        table = comparison_table(result.summary)
        if table is None:
            print("scores:  none, as no rows are held out")
        for one in (table, personal_table(result.summary)):
            if one is not None:
                print_table(one, sys.stdout)
        print(f"adapter: {result.adapter}")
        if result.figures:
            print(f"figures: {result.figures[0].parent}")
        print(f"next:    {shlex.join(_next(result, access))}")


def _next(result: Any, access: Access) -> tuple[str, ...]:
    from atoll.commands.train import example_prompt

    prompt = example_prompt(result.run_dir)
    if prompt is None:
        return (program(), "evaluate", str(result.run_dir))
    return (program(), "generate", str(result.run_dir), prompt, *access.given())
