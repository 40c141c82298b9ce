"""A run: `atoll init`, `plan`, `train` and `resume`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli.loudness import aside, tell
from atoll.cli.options import Access, Engine, NewRun, Output, Overrides, Run, RunFileOrRun
from atoll.cli.parsing import command
from atoll.cli.showing import program, show_training

commands = typer.Typer()


@command(commands)
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", hidden=True)],
    full: Annotated[bool, typer.Option("--full", help="Every key, with what it means.")] = False,
) -> None:
    """Write a run.toml and sample data to start from.

    DIR must be absent or empty.
    """
    from atoll.commands.init import init as write_folder

    config = write_folder(directory, full=full)
    print(f"wrote {config} and sample data beside it")
    aside(f"next: {shlex.join((*program(), 'train', str(config)))}")


@command(commands)
def plan(run_file: RunFileOrRun, overrides: Overrides, output: Output) -> None:
    """What each edge would do, and why; trains nothing.

    Memory, time and bytes by formula, and the limit that binds. No weights are loaded.
    """
    with output.results() as show:
        run_file.check(overrides.given())
        from atoll.commands.plan import plan as make_plan

        fleet = make_plan(run_file.config, overrides=overrides.given(), trust=run_file.trust).to_json()
        if output.as_json:
            show(fleet)
            return
        from atoll.report.plans import plan_table
        from atoll.report.tables import print_table

        print_table(plan_table(fleet), sys.stdout)


@command(commands)
def train(run_file: RunFileOrRun, *, out: NewRun = None, overrides: Overrides, access: Access, engine: Engine, output: Output) -> None:
    """Run it: private shards in, one adapter out.

    RUN.toml says what to do; `atoll init` writes one. The run directory holds the adapter as Hugging Face PEFT writes it.
    A run's own folder: the same run again, bit for bit. Edges with mode = "split" train against --host, or against one that starts here
    on loopback.
    """
    engine.check(access)
    run_file.check(overrides.given())

    def begin(progress: Any) -> Any:
        if engine.engine == "flower":
            from atoll.fleet.train import train_on_fleet

            return train_on_fleet(
                run_file.config, engine.fleet, tell, out=out, overrides=overrides.given(), observers=(progress,), trust=run_file.trust
            )
        from atoll.commands.train import train as run

        given = overrides.given()
        return run(run_file.config, out=out, overrides=given, observers=(progress,), host=access.opened(), trust=run_file.trust)

    show_training(begin, access, output, _on_resume(access, engine))


@command(commands)
def resume(run: Run, access: Access, engine: Engine, output: Output) -> None:
    """Go on with a run that was stopped or killed.

    RUN_DIR is a folder that `atoll train` wrote. Its adapter becomes what it would have been; a complete run stays as it is.
    """
    engine.check(access)
    from atoll.runs.layout import RunDirectory

    RunDirectory.open(run.run_dir)  # Answered at once, before the seconds that torch takes to open.

    def begin(progress: Any) -> Any:
        if engine.engine == "flower":
            from atoll.fleet.train import resume_on_fleet

            return resume_on_fleet(run.run_dir, engine.fleet, tell, (progress,), trust=run.trust)
        from atoll.commands.resume import resume as go_on

        return go_on(run.run_dir, observers=(progress,), host=access.opened(), trust=run.trust)

    show_training(begin, access, output, _on_resume(access, engine))


def _on_resume(access: Access, engine: Engine) -> tuple[str, ...] | None:
    """What `atoll resume` is to be given; None for edges that started with a run and are gone with it."""
    if engine.engine == "flower" and engine.fleet is None:
        return None
    fleet = () if engine.fleet is None else ("--engine", "flower", "--fleet", str(engine.fleet))
    return (*access.given(), *fleet)
