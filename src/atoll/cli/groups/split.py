"""Most of the base on another machine: `atoll host`, with `certify`, `renew` and `revoke`, `edge` and `status`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli import loudness
from atoll.cli.options import MODEL, Access, CaKey, Insecure, NewRun, Output, RunFile, Sets
from atoll.cli.parsing import command, command_with_commands
from atoll.cli.showing import show_training
from atoll.errors import CommandLineError

commands = typer.Typer()
_BITS, _PRECISIONS = ("16", "8", "4"), ("fp32", "bf16")

AuthorityFolder = Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where ca.pem is, with what it signs.")]


def _one_of(values: Sequence[str]) -> Callable[[], list[str]]:
    """For the shell's completion, where wrong values have an answer of our own."""
    return lambda: list(values)


@dataclass(frozen=True, slots=True)
class RequiredAccess(Access):
    """Which host, and how to reach it, where there must be one."""

    host: Annotated[str, typer.Option("--host", metavar="HOST:PORT", help="The host that keeps most of the base.")]


@dataclass(frozen=True, slots=True)
class NamedAccess(Access):
    """The same where the host is all that the command is about."""

    host: Annotated[str, typer.Argument(metavar="HOST:PORT", hidden=True)]


@dataclass(frozen=True, slots=True)
class Serving:
    """What `atoll host` is told; names are those of `HostSettings`."""

    model: Annotated[str, MODEL]
    listen: Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Port 0: any free one.")] = "127.0.0.1:7431"
    quantize: Annotated[
        int, typer.Option("--quantize", metavar="BITS", help="16, 8 or 4; 16 keeps --precision.", autocompletion=_one_of(_BITS))
    ] = 16
    precision: Annotated[
        str, typer.Option("--precision", metavar="P", help="fp32 or bf16, as devices say.", autocompletion=_one_of(_PRECISIONS))
    ] = "fp32"
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", metavar="FILE", help="The host's certificate: turns TLS on.")] = None
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="The key of --tls-cert.")] = None
    client_ca: Annotated[Path | None, typer.Option("--client-ca", metavar="FILE", help="Take only devices that this CA signed.")] = None
    crl: Annotated[
        Path | None, typer.Option("--crl", metavar="FILE", help="With --client-ca: believe no certificate on this list.")
    ] = None
    make_certificates: Annotated[
        Path | None, typer.Option("--make-certificates", metavar="DIR", help="Write and use a development CA and certificates.")
    ] = None
    tenants: Annotated[
        list[str] | None, typer.Option("--tenant", metavar="NAME", help="With --make-certificates: a device to certify; may be repeated.")
    ] = None
    insecure: Insecure = False
    max_sessions: Annotated[int, typer.Option("--max-sessions", min=1, metavar="N", help="Devices at a time.")] = 16
    max_tenant_sessions: Annotated[
        int | None, typer.Option("--max-tenant-sessions", min=1, metavar="N", help="Devices at a time with one certificate name.")
    ] = None
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Largest micro-batch, in tokens with padding.")] = (
        16_384
    )
    idle_seconds: Annotated[float, typer.Option("--idle", min=0.1, metavar="SECONDS", help="End a session that is silent for longer.")] = (
        600.0
    )
    exchange_seconds: Annotated[
        float, typer.Option("--exchange", min=0.1, metavar="SECONDS", help="End one that holds a micro-batch longer.")
    ] = 3600.0
    silence_seconds: Annotated[
        float, typer.Option("--silence", min=0.1, metavar="SECONDS", help="End one that was silent for longer in all.")
    ] = 14_400.0
    tenant_tokens_per_second: Annotated[
        float | None, typer.Option("--max-tenant-rate", min=1e-3, metavar="X", help="Tokens a second of one certificate name.")
    ] = None
    tenant_bytes: Annotated[
        str | None, typer.Option("--max-tenant-bytes", metavar="SIZE", help="Of one certificate name: 20GB/day or /hour.")
    ] = None
    tenant_limits: Annotated[
        Path | None, typer.Option("--tenant-limits", metavar="FILE", help="Limits of single certificate names, in TOML.")
    ] = None
    merges: Annotated[
        bool, typer.Option("--merge", help="Let devices merge killed modules: a copy of a weight for each, in every session.")
    ] = False
    recomputes: Annotated[
        bool, typer.Option("--recompute", help="Keep no activations of lent adapters while devices compute: run blocks twice.")
    ] = False
    batches: Annotated[
        bool, typer.Option("--dynamic-batching", help="With --recompute: devices that wait are computed together, not to the same bits.")
    ] = False
    cache: Annotated[
        str, typer.Option("--cache", metavar="SIZE", help="Keys and values kept while devices generate, of all; 0: none.")
    ] = "1 GB"
    metrics: Annotated[str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Prometheus metrics there.")] = None
    device_map: Annotated[
        str | None, typer.Option("--device-map", metavar="MAP", help='Over several accelerators: "auto", or a JSON file.')
    ] = None
    max_part: Annotated[
        str | None, typer.Option("--max-part", metavar="FRONT,BACK", help="Blocks a tenant may fetch. Default: one cut's.")
    ] = None
    audit: Annotated[Path | None, typer.Option("--audit", metavar="FILE", help="Add there who asked for what, as lines of JSON.")] = None
    metrics_tenants: Annotated[bool, typer.Option("--metrics-tenants", help="With --metrics: for each certificate name, too.")] = False
    codecs: Annotated[
        list[str] | None, typer.Option("--codec", metavar="NAME", help="One that is not Atoll's, beside those; may be repeated.")
    ] = None

    def __post_init__(self) -> None:
        if str(self.quantize) not in _BITS or self.precision not in _PRECISIONS:
            raise CommandLineError(
                "a base cannot be served like this", where="atoll host", got=f"--quantize {self.quantize} --precision {self.precision}",
                expected="--quantize 16, 8 or 4, and --precision fp32 or bf16", do="choose among these",
            )  # fmt: skip
        if self.batches and (not self.recomputes or self.quantize == 8):
            raise CommandLineError(
                "--dynamic-batching goes with --recompute, and not with --quantize 8, whose products depend on all rows of a batch",
                where="atoll host", got=f"--quantize {self.quantize}" if self.recomputes else "--dynamic-batching alone",
                expected="--recompute --dynamic-batching, with --quantize 16 or 4", do="add --recompute, or leave --dynamic-batching out",
            )  # fmt: skip
        if self.tenants and self.make_certificates is None:
            raise CommandLineError(
                "--tenant goes with --make-certificates", where="atoll host", got="--tenant alone", expected="both", do="add the folder",
            )  # fmt: skip
        numbers = {
            "--idle": self.idle_seconds, "--exchange": self.exchange_seconds, "--silence": self.silence_seconds,
            "--max-tenant-rate": self.tenant_tokens_per_second,
        }  # fmt: skip
        for option, number in numbers.items():
            if number is not None and not math.isfinite(number):
                raise CommandLineError(
                    f"{option} is a number", where="atoll host", got=str(number), expected="a finite number",
                    do="write a large one for no limit",
                )  # fmt: skip


def host(serving: Serving) -> None:
    """Serve a frozen base to edges.

    Their data and adapters stay with them. Edges come with `atoll edge RUN.toml --host HOST:PORT`.
    An address other than loopback needs TLS.
    """
    from atoll.commands.host import HostSettings
    from atoll.commands.host import host as serve

    settings = HostSettings(**{**asdict(serving), "tenants": tuple(serving.tenants or ()), "codecs": tuple(serving.codecs or ())})
    serve(settings, _told)


def _told(line: str) -> None:
    if not loudness.is_quiet() or line.startswith("serving "):
        print(line, flush=True)


hosts = command_with_commands(host)
commands.add_typer(hosts)


@command(hosts)
def certify(
    tenant: Annotated[str, typer.Argument(metavar="NAME", hidden=True)],
    folder: AuthorityFolder = Path(),
    ca_key: CaKey = None,
) -> None:
    """Write a certificate for one more tenant.

    By the authority that `atoll host --make-certificates DIR` made; NAME is how hosts with its ca.pem as --client-ca know the tenant.
    """
    from atoll.commands.hosts.certificates import certify as write_certificate

    print(write_certificate(tenant, folder, ca_key=ca_key).to_text())


@command(hosts)
def renew(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", hidden=True)] = None,
    folder: AuthorityFolder = Path(),
    ca_key: CaKey = None,
) -> None:
    """New certificates for the host and all tenants, or for NAME.

    They hold for a year. NAME is a tenant, or "host" for the host itself. Those before stay good until they end.
    """
    from atoll.commands.hosts.certificates import renew as write_certificates

    print(write_certificates(folder, name, ca_key=ca_key).to_text())


@command(hosts)
def revoke(
    tenant: Annotated[str, typer.Argument(metavar="NAME", hidden=True)],
    folder: AuthorityFolder = Path(),
    cert: Annotated[
        Path | None, typer.Option("--certificate", metavar="FILE", help="One more of the tenant's, kept elsewhere.")
    ] = None,
    unknown: Annotated[bool, typer.Option("--unknown", help="Also a name that has no certificate in DIR.")] = False,
    ca_key: CaKey = None,
) -> None:
    """Keep a tenant out from now on.

    Every certificate that NAME was given until now is on DIR/revoked.pem, which hosts read with --crl while they run.
    Its files in DIR are deleted.
    """
    from atoll.commands.hosts.certificates import revoke as put_on_list

    print(put_on_list(tenant, folder, cert=cert, unknown=unknown, ca_key=ca_key).to_text())


@command(commands)
def edge(
    run_file: RunFile,
    *,
    access: RequiredAccess,
    name: Annotated[str | None, typer.Option("--edge", metavar="NAME", help="Which edge of RUN.toml this machine is, if many.")] = None,
    fetch_base: Annotated[
        Path | None, typer.Option("--fetch-base", metavar="DIR", help="Keep this machine's part of the base there; fetched if absent.")
    ] = None,
    out: NewRun = None,
    sets: Sets = None,
    output: Output,
) -> None:
    """Train this machine's adapter against a host.

    Data, adapter and optimizer stay here; most of the base is in the host. RUN.toml is as for `atoll train`.
    """
    overrides = tuple(sets or ())
    run_file.check(overrides)
    from atoll.commands.edge import edge as run

    def begin(progress: Any) -> Any:
        return run(run_file.config, access.opened(), name=name, fetch_base=fetch_base, out=out, overrides=overrides, observers=(progress,))

    show_training(begin, access, output, access.given() if _can_go_on(run_file.config, overrides, name) else None)


def _can_go_on(config: Path, overrides: tuple[str, ...], name: str | None) -> bool:
    """Whether `atoll resume` knows this edge's rows: it is the only one, or names its own."""
    from atoll.config.load import load

    edges = load(config, overrides).config.edge
    return len(edges) < 2 or any(edge.name == name and edge.data is not None for edge in edges)


@command(commands)
def status(access: NamedAccess, output: Output) -> None:
    """What a host serves and how busy it is.

    HOST:PORT is where `atoll host` listens. With a certificate, only that tenant's sessions are told.
    """
    with output.results() as show:
        from atoll.commands.hosts.status import status as ask
        from atoll.report.hosts import status_table
        from atoll.report.tables import print_table

        value = ask(access.opened())
        if output.as_json:
            show(value)
        else:
            print_table(status_table(value), sys.stdout)
