"""A run that is on many machines: `atoll fleet init` and `join`, and members that come and go."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.loudness import tell
from atoll.cli.options import CaKey, RunFile, Sets
from atoll.cli.parsing import command, command_with_commands

WholeFleet = Annotated[Path, typer.Option("--fleet", metavar="DIR", help="What `atoll fleet init` wrote.")]


def fleet(context: typer.Context) -> None:
    """The machines of a run that is on many."""
    print(context.get_help())


commands = command_with_commands(fleet)


@command(commands)
def init(
    run_file: RunFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="An absent or empty folder for all of it.")],
    address: Annotated[str, typer.Option("--address", metavar="HOST:PORT", help="The coordinator, as edges call it.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="[NAME=]HOST:PORT[:EDGE,EDGE]", help="A host, and its edges, or all others; may be repeated."),
    ] = None,
) -> None:
    """Write the folder of every machine.

    Certificates, keys and RUN.toml for the coordinator, each host and each [[edge]]; DIR/README.md says what to copy where.
    """
    run_file.check()
    from atoll.fleet.init import init as write_folders

    print(write_folders(run_file.config, out, address, tuple(hosts or ())).to_text())


@command(commands)
def join(
    folder: Annotated[Path, typer.Argument(metavar="DIR", hidden=True)],
    config: Annotated[Path | None, typer.Option("--config", metavar="RUN.toml", help="Instead of the one in DIR.")] = None,
    sets: Sets = None,
) -> None:
    """Take part with this machine's rows, until stopped.

    DIR is one that `atoll fleet init` wrote for an edge. The base and the rows stay in this process from round to round. When a run is
    over, it waits for the next; Ctrl-C or SIGTERM ends it, with exit status 0.
    """
    from atoll.fleet.join import join as take_part

    # Also in the middle of a round, which is trained again from the state before.
    with contextlib.suppress(KeyboardInterrupt):
        take_part(folder, tell, config=config, overrides=tuple(sets or ()), stop=threading.Event())


@command(commands)
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", hidden=True)],
    folder: WholeFleet = Path("fleet"),
    config: Annotated[Path | None, typer.Option("--config", metavar="RUN.toml", help="With the edge in it, for all machines.")] = None,
    host: Annotated[str | None, typer.Option("--host", metavar="HOST:PORT", help="The host of an edge that may split.")] = None,
    ca_key: CaKey = None,
) -> None:
    """Write the folder of one more edge.

    NAME is an [[edge]] of run.toml. The coordinator's folder learns its key.
    """
    from atoll.fleet.members import add as add_member

    print(add_member(folder, name, config=config, host=host, ca_key=ca_key).to_text())


@command(commands)
def renew(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", hidden=True)] = None,
    folder: WholeFleet = Path("fleet"),
    ca_key: CaKey = None,
) -> None:
    """New certificates for all machines, or for NAME.

    They hold for a year. NAME is "coordinator", an edge or a host. Those before stay good until they end.
    """
    from atoll.fleet.members import renew as renew_member

    print(renew_member(folder, name, ca_key=ca_key).to_text())


@command(commands)
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", hidden=True)],
    folder: WholeFleet = Path("fleet"),
    ca_key: CaKey = None,
) -> None:
    """Revoke an edge's certificates and forget its key.

    The coordinator keeps NAME out as soon as its folder has the new list; it need not be started again.
    """
    from atoll.fleet.members import remove as remove_member

    print(remove_member(folder, name, ca_key=ca_key).to_text())
