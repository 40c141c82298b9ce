"""What each command does once it is parsed: call one function of atoll.commands, show what it returns."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_FAILED_CHECK = 1


def init(directory: Path) -> None:
    """Write a folder to start from, and say what to do with it."""
    from atoll.commands.init import init as write_folder

    config = write_folder(directory)
    print(f"wrote {config} and sample data beside it\nnext: atoll train {config}")


def plan(config: Path, *, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what each edge would do."""
    with _results(as_json) as show:
        _check_config(config, overrides)
        from atoll.commands.plan import plan as make_plan

        fleet = make_plan(config, overrides=overrides).to_json()
        if as_json:
            show(fleet)
            return
        from atoll.report.plans import plan_table
        from atoll.report.tables import print_table

        print_table(plan_table(fleet), sys.stdout)


def train(config: Path, *, out: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run it and show the comparison, the adapter, and what to try next."""
    with _results(as_json) as show:
        _check_config(config, overrides)
        from atoll.commands.train import train as run
        from atoll.report.progress import Progress

        with Progress() as progress:
            result = run(config, out=out, overrides=overrides, observers=(progress,))
        if as_json:
            show({**result.summary.to_json(), "run_dir": str(result.run_dir), "adapter": str(result.adapter)})
            return
        from atoll.commands.example import example_prompt
        from atoll.report.tables import comparison_table, print_table

        table = comparison_table(result.summary)
        if table is not None:
            print_table(table, sys.stdout)
        print(f"adapter: {result.adapter}")
        prompt = example_prompt(config, overrides=overrides)
        print(f"next:    atoll generate {shlex.quote(str(result.run_dir))} {shlex.quote(prompt)}")


def evaluate(
    *, run_dir: Path | None, model: str | None, adapter: Path | None, data: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Show the scores of a run, or of a model with or without an adapter."""
    with _results(as_json) as show:
        from atoll.commands.evaluate import evaluate as measure
        from atoll.report.progress import Progress

        with Progress() as progress:
            scores = measure(run_dir=run_dir, model=model, adapter=adapter, data=data, overrides=overrides, observers=(progress,))
        if as_json:
            show(scores)
            return
        from atoll.report.tables import print_table, scores_table

        print_table(scores_table(_score_rows(scores), "held-out rows"), sys.stdout)


def generate(run_dir: Path, prompt: str, *, max_new_tokens: int) -> None:
    """Show what the trained model answers."""
    with _results(as_json=False):
        from atoll.commands.generate import generate as answer

        print(answer(run_dir, prompt, max_new_tokens=max_new_tokens))


def merge(run_dir: Path, *, out: Path) -> None:
    """Write the merged model and say where."""
    from atoll.commands.merge import merge as write_model

    print(f"wrote {write_model(run_dir, out=out)}")


def doctor(*, as_json: bool) -> int:
    """Show what this machine has; the status tells whether something would fail."""
    with _results(as_json) as show:
        from atoll.commands.doctor import doctor as examine

        report = examine()
        if as_json:
            show(report.to_json())
        else:
            print(report.to_text())
    return 0 if report.is_well else _FAILED_CHECK


def _check_config(config: Path, overrides: tuple[str, ...]) -> None:
    """Answer a wrong config at once; the command reads it again after the seconds that torch takes to open."""
    from atoll.config.load import load

    load(config, overrides)


@contextlib.contextmanager
def _results(as_json: bool) -> Iterator[Callable[[object], None]]:
    """Keep standard output for the one document: whatever a library prints meanwhile goes to standard error."""
    stdout = sys.stdout

    def show(value: object) -> None:
        from atoll.runs.files import finite

        print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False), file=stdout)

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield show


def _score_rows(scores: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float | None]]]:
    """One row for each named set of scores; scores without a name are one row."""
    named: list[tuple[str, Any]] = [(name, value) for name, value in scores.items() if isinstance(value, Mapping)]
    return named or [("model", scores)]
