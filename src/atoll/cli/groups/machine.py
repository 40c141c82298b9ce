"""This machine: `atoll doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli.boundary import FAILED
from atoll.cli.options import Access, Output
from atoll.cli.parsing import command
from atoll.errors import CommandLineError

commands = typer.Typer()


@command(commands)
def doctor(
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="FILE", help="Measure memory and speed, and write them there for run.toml.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="M", help='Measure on this base; default "tiny".')] = None,
    fleet: Annotated[
        Path | None, typer.Option("--fleet", metavar="DIR", help="Examine a fleet's folder, one machine's of it, or a host's certificates.")
    ] = None,
    *,
    access: Access,
    output: Output,
) -> int:
    """What this machine has, what would fail, and what to do.

    With --profile: what an [[edge]] of run.toml declares, measured here; the link, too, if --host is given. With --fleet: certificates,
    keys, files and connections of a fleet.
    """
    if profile is None and (measured := (*(("--base", base) if base else ()), *access.given())):
        raise CommandLineError(
            "what to measure goes with --profile", where="atoll doctor", got=" ".join(measured),
            expected="atoll doctor --profile FILE [--base M] [--host HOST:PORT]", do="add --profile FILE",
        )  # fmt: skip
    if profile is not None and fleet is not None:
        raise CommandLineError(
            "a fleet is examined, or this machine measured", where="atoll doctor", got="--profile and --fleet", expected="one of the two",
            do="run atoll doctor twice",
        )  # fmt: skip
    with output.results() as show:
        report = _examined(fleet) if profile is None else _measured(profile, base or "tiny", access)
        if output.as_json:
            show(report.to_json())
        elif profile is not None:
            print(report.to_text())
        else:
            from atoll.report.tables import width_of

            print(report.to_text(width_of(sys.stdout)))
    return 0 if profile is not None or report.is_well else FAILED


def _examined(fleet: Path | None) -> Any:
    if fleet is None:
        from atoll.commands.doctor import doctor as examine

        return examine()
    from atoll.fleet.check import check_fleet

    return check_fleet(fleet)


def _measured(profile: Path, base: str, access: Access) -> Any:
    from atoll.commands.doctor import profile as measure

    return measure(profile, base=base, host=access.opened())
