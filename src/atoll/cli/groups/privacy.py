"""What a run gives away: `atoll audit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli.loudness import tell
from atoll.cli.options import Output, Overrides, RunFileOrRun
from atoll.cli.parsing import command

commands = typer.Typer()


@command(commands)
def audit(
    run_file: RunFileOrRun,
    *,
    minutes: Annotated[float, typer.Option("--minutes", min=0.01, metavar="M", help="For all attacks.")] = 2.0,
    public: Annotated[Path | None, typer.Option("--public", metavar="DATA", help="Text that is no secret, to learn from.")] = None,
    no_example: Annotated[bool, typer.Option("--no-example", help="Show no private row.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep audit.json there.")] = None,
    overrides: Overrides,
    output: Output,
) -> None:
    """Attack what this run would send; say what was recovered.

    Plays a curious host and a curious coordinator on this machine; nothing leaves it. Of a run's folder: with its finished adapter, and
    the figures are noted in its summary.json.
    """
    with output.results() as show:
        run_file.check(overrides.given())
        from atoll.commands.privacy.audit import Effort
        from atoll.commands.privacy.audit import audit as attack
        from atoll.report.privacy.audit import audit_table, describe

        def told(finding: Any) -> None:
            tell(describe(finding.to_json(example=False)))

        document = attack(
            run_file.config, overrides=overrides.given(), trust=run_file.trust, effort=Effort(minutes, public), out=out,
            example=not no_example, told=told,
        )  # fmt: skip
        if output.as_json:
            show(document)
            return
        from atoll.report.tables import print_table

        print_table(audit_table(document), sys.stdout)
