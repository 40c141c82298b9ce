"""`atoll fleet ...` and `atoll host certify` as typed; app.py puts the commands in their group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli import actions

WholeFleet = Annotated[Path, typer.Option("--fleet", metavar="DIR", help="What `atoll fleet init` wrote, as a whole.")]
CaKey = Annotated[Path | None, typer.Option("--ca-key", metavar="FILE", help="ca.key, where it is kept apart.")]


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


def add(
    name: Annotated[str, typer.Argument(metavar="NAME", hidden=True)],
    folder: WholeFleet = Path("fleet"),
    config: Annotated[Path | None, typer.Option("--config", metavar="RUN.toml", help="With the edge in it, for all machines.")] = None,
    host: Annotated[str | None, typer.Option("--host", metavar="HOST:PORT", help="The host of an edge that may split.")] = None,
    ca_key: CaKey = None,
) -> Callable[[], int | None]:
    """Write the folder of one more edge.

    NAME is an [[edge]] of run.toml. The coordinator's folder learns its key.
    """
    return partial(actions.fleet_add, folder, name, config=config, host=host, ca_key=ca_key)


def renew(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", hidden=True)] = None,
    folder: WholeFleet = Path("fleet"),
    ca_key: CaKey = None,
) -> Callable[[], int | None]:
    """New certificates for all machines, or for NAME.

    They hold for a year. NAME is "coordinator", an edge or a host. Those before stay good until they end.
    """
    return partial(actions.fleet_renew, folder, name, ca_key=ca_key)


def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", hidden=True)],
    folder: WholeFleet = Path("fleet"),
    ca_key: CaKey = None,
) -> Callable[[], int | None]:
    """Revoke an edge's certificates and forget its key.

    The coordinator keeps NAME out as soon as its folder has the new list; it need not be started again.
    """
    return partial(actions.fleet_remove, folder, name, ca_key=ca_key)


def certify(
    tenant: Annotated[str, typer.Argument(metavar="NAME", hidden=True)],
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where ca.pem is; the certificate is written there.")] = Path(),
    ca_key: CaKey = None,
) -> Callable[[], int | None]:
    """Write a certificate for one more tenant.

    By the authority that `atoll host --make-certificates DIR` made; NAME is how hosts with its ca.pem as --client-ca know the tenant.
    """
    return partial(actions.certify, tenant, folder=folder, ca_key=ca_key)
