"""`atoll fleet ...` as typed; app.py puts the commands in their group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli import actions


def init(
    config: Annotated[Path, typer.Argument(metavar="RUN.toml", hidden=True)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="An absent or empty folder for all of it.")],
    address: Annotated[str, typer.Option("--address", metavar="HOST:PORT", help="The coordinator, as edges call it.")],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="[NAME=]HOST:PORT[:EDGE,EDGE]", help="A host, and its edges, or all others; may be repeated."),
    ] = None,
) -> Callable[[], int | None]:
    """Write the folder of every machine.

    Certificates, keys and RUN.toml for the coordinator, each host and each [[edge]]; DIR/README.md says what to copy where.
    """
    return partial(actions.fleet_init, config, out=out, address=address, hosts=tuple(host or ()))


def join(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of this machine's edge.", hidden=True)],
    config: Annotated[Path | None, typer.Option("--config", metavar="RUN.toml", help="Instead of the one in DIR.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated.")] = None,
) -> Callable[[], int | None]:
    """Take part with this machine's rows, until stopped.

    DIR is one that `atoll fleet init` wrote for an edge. The base and the rows stay in this process from round to round.
    """
    return partial(actions.fleet_join, folder, config=config, overrides=tuple(sets or ()))
