"""The command line as typed: commands, options, help. What a command does is in actions.py; libraries open there, when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import click
import typer
import typer.core

from atoll.cli import actions, fleet
from atoll.cli.actions import Access
from atoll.cli.boundary import Boundary
from atoll.errors import CommandLineError

# Of the contract, and of later versions: named here so that the answer to typing one is exact.
_LATER = ("audit", "report", "watch")
Action = Callable[[], int | None]  # what parsing returns; `main` runs it, so that click never sees what it raises


class Command(typer.core.TyperCommand):
    """A command whose help is plain text: typer 0.20 escapes brackets for rich even when rich does not print them."""

    def get_help(self, ctx: click.Context) -> str:
        """The help page."""
        return super().get_help(ctx).replace("\\[", "[")


class Commands(typer.core.TyperGroup):
    """The group of commands, with our own answer to a name that it does not have."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name.

        Raises: CommandLineError naming the commands there are.
        """
        if (pair := " ".join(args[:2])) in self.commands and len(args) > 1:  # `host certify`, beside `host` with its options.
            return pair, self.commands[pair], args[2:]
        if args and args[0] not in self.commands:
            raise _no_such_command(ctx.command_path, args[0], list(self.commands))
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names for the help page: commands first, as typer puts groups before them."""
        return sorted(self.commands, key=lambda name: isinstance(self.commands[name], click.Group))


_WIDE = {"max_content_width": 110}
app = typer.Typer(
    cls=Commands, name="atoll", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=_WIDE
)

# Arguments are described in the commands' docstrings: typer 0.20 loses their help under click 8.5.
ConfigFile = Annotated[Path, typer.Argument(metavar="RUN.toml", hidden=True)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", hidden=True)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Put one value on top of the file; may be repeated.")
]
Method = Annotated[str | None, typer.Option("--method", metavar="NAME", help="Do as a published method does; --set still counts.")]
HostAddress = Annotated[str | None, typer.Option("--host", metavar="HOST:PORT", help="A host that keeps most of the base (atoll host).")]
Engine = Annotated[Literal["here", "flower"], typer.Option("--engine", help="Edges run in this process, or over Flower.")]
FleetFolder = Annotated[Path | None, typer.Option("--fleet", metavar="DIR", help="With flower: the coordinator's folder.")]
Ca = Annotated[Path | None, typer.Option("--ca", metavar="FILE", help="The CA that signed the host's certificate: turns TLS on.")]
Cert = Annotated[Path | None, typer.Option("--cert", metavar="FILE", help="This machine's certificate, where the host asks for one.")]
Key = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="The key of --cert.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow another address than loopback without TLS.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; nothing is raised."""
    with Boundary() as boundary:
        command = typer.main.get_command(app)
        given = list(sys.argv[1:] if arguments is None else arguments)
        parsed = command.main(args=given, prog_name="atoll", standalone_mode=False)
        status = parsed() if callable(parsed) else parsed
        sys.stdout.flush()
        boundary.status = status if isinstance(status, int) else 0
    return boundary.status


@app.callback(invoke_without_command=True)
def atoll(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Fine-tune a large language model on private data that stays with its owners."""
    if version:
        from atoll import __version__

        print(f"atoll {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command(cls=Command)
def init(directory: Annotated[Path, typer.Argument(metavar="DIR", hidden=True)]) -> Action:
    """Write a commented run.toml and sample data.

    DIR must be absent or empty.
    """
    return partial(actions.init, directory)


@app.command(cls=Command)
def plan(config: ConfigFile, method: Method = None, sets: Sets = None, as_json: Json = False) -> Action:
    """What each edge would do, and why; trains nothing.

    Memory, time and bytes by formula, and the limit that binds. No weights are loaded.
    """
    return partial(actions.plan, config, overrides=_overrides(method, sets), as_json=as_json)


@app.command(cls=Command)
def train(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory; default runs/NAME-0001, -0002, ...")] = None,
    method: Method = None,
    sets: Sets = None,
    host: HostAddress = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
    engine: Engine = "here",
    fleet_folder: FleetFolder = None,
    as_json: Json = False,
) -> Action:
    """Run it: private shards in, one adapter out.

    RUN.toml says what to do; `atoll init` writes one. The run directory holds the adapter as Hugging Face PEFT writes it.
    Edges with mode = "split" train against --host, or against one that starts here on loopback.
    """
    access, place = Access(host, ca, cert, key, insecure), actions.Fleet(engine, fleet_folder)
    return partial(actions.train, config, out=out, overrides=_overrides(method, sets), access=access, fleet=place, as_json=as_json)


@app.command(cls=Command)
def resume(
    run_dir: RunFolder,
    host: HostAddress = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
    engine: Engine = "here",
    fleet_folder: FleetFolder = None,
    as_json: Json = False,
) -> Action:
    """Go on with a run that was stopped or killed.

    RUN_DIR is a folder that `atoll train` wrote. Its adapter becomes what it would have been; a complete run stays as it is.
    """
    access, place = Access(host, ca, cert, key, insecure), actions.Fleet(engine, fleet_folder)
    return partial(actions.resume, run_dir, access=access, fleet=place, as_json=as_json)


@app.command(cls=Command)
def host(
    model: Annotated[str, typer.Option("--model", metavar="M", help='"tiny", a folder, or a Hugging Face id.')],
    listen: Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Port 0: any free one.")] = "127.0.0.1:7431",
    quantize: Annotated[int, typer.Option("--quantize", metavar="BITS", help="16, 8 or 4 bits per weight; 16 keeps --precision.")] = 16,
    precision: Annotated[str, typer.Option("--precision", metavar="P", help="fp32 or bf16; devices must say the same.")] = "fp32",
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", metavar="FILE", help="The host's certificate: turns TLS on.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="The key of --tls-cert.")] = None,
    client_ca: Annotated[Path | None, typer.Option("--client-ca", metavar="FILE", help="Take only devices that this CA signed.")] = None,
    make_certificates: Annotated[
        Path | None, typer.Option("--make-certificates", metavar="DIR", help="Write a development CA and certificates, and use them.")
    ] = None,
    tenant: Annotated[
        list[str] | None, typer.Option("--tenant", metavar="NAME", help="With --make-certificates: a device to certify; may be repeated.")
    ] = None,
    insecure: Insecure = False,
    max_sessions: Annotated[int, typer.Option("--max-sessions", min=1, metavar="N", help="Devices at a time.")] = 16,
    max_tenant_sessions: Annotated[
        int | None, typer.Option("--max-tenant-sessions", min=1, metavar="N", help="Devices at a time with the same certificate name.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Largest micro-batch, with padding.")] = 16_384,
    idle: Annotated[float, typer.Option("--idle", min=0.1, metavar="SECONDS", help="End a session that is silent for longer.")] = 600.0,
    exchange: Annotated[
        float, typer.Option("--exchange", min=0.1, metavar="SECONDS", help="End a session that keeps one micro-batch waiting for longer.")
    ] = 3600.0,
    merge: Annotated[
        bool, typer.Option("--merge", help="Let devices merge killed modules: a copy of a weight for each, in every session.")
    ] = False,
    metrics: Annotated[str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Prometheus metrics there.")] = None,
    device_map: Annotated[
        str | None, typer.Option("--device-map", metavar="MAP", help='Spread the base over accelerators: "auto", or a JSON file.')
    ] = None,
) -> Action:
    """Serve a frozen base to edges.

    Their data and adapters stay with them. Edges come with `atoll edge RUN.toml --host HOST:PORT`.
    An address other than loopback needs TLS.
    """
    if quantize not in (16, 8, 4) or precision not in ("fp32", "bf16"):
        raise CommandLineError(
            "a base cannot be served like this", where="atoll host", got=f"--quantize {quantize} --precision {precision}",
            expected="--quantize 16, 8 or 4, and --precision fp32 or bf16", do="choose among these",
        )  # fmt: skip
    if tenant and make_certificates is None:
        raise CommandLineError(
            "--tenant goes with --make-certificates", where="atoll host", got="--tenant alone", expected="both", do="add the folder",
        )  # fmt: skip
    if max_tenant_sessions is not None and client_ca is None and not tenant:
        raise CommandLineError(
            "--max-tenant-sessions needs certificates that name the devices", where="atoll host", got="no certificates of devices",
            expected="--client-ca, or --make-certificates with --tenant", do="add them, or use --max-sessions",
        )  # fmt: skip
    settings = {
        "model": model, "listen": listen, "quantize": quantize, "precision": precision, "tls_cert": tls_cert, "tls_key": tls_key,
        "client_ca": client_ca, "insecure": insecure, "make_certificates": make_certificates, "tenants": tuple(tenant or ()),
        "metrics": metrics, "max_sessions": max_sessions, "max_tokens": max_tokens, "idle_seconds": idle,
        "max_tenant_sessions": max_tenant_sessions, "exchange_seconds": exchange, "merges": merge, "device_map": device_map,
    }  # fmt: skip
    return partial(actions.host, settings)


app.command(cls=Command, name="host certify")(fleet.certify)


@app.command(cls=Command)
def edge(
    config: ConfigFile,
    host: Annotated[str, typer.Option("--host", metavar="HOST:PORT", help="The host that keeps most of the base.")],
    name: Annotated[str | None, typer.Option("--edge", metavar="NAME", help="Which [[edge]] this machine is, if there are many.")] = None,
    fetch_base: Annotated[
        Path | None, typer.Option("--fetch-base", metavar="DIR", help="Keep this machine's part of the base there; fetched if absent.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory; default runs/NAME-0001, -0002, ...")] = None,
    sets: Sets = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> Action:
    """Train this machine's adapter against a host.

    Data, adapter and optimizer stay here; most of the base is in the host. RUN.toml is as for `atoll train`.
    """
    access = Access(host, ca, cert, key, insecure)
    options = {"name": name, "fetch_base": fetch_base, "out": out, "overrides": tuple(sets or ())}
    return partial(actions.edge, config, access=access, options=options, as_json=as_json)


@app.command(cls=Command)
def status(
    host: Annotated[str, typer.Argument(metavar="HOST:PORT", hidden=True)],
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> Action:
    """What a host serves and how busy it is.

    HOST:PORT is where `atoll host` listens. With a certificate, only that tenant's sessions are told.
    """
    return partial(actions.status, Access(host, ca, cert, key, insecure), as_json=as_json)


@app.command(cls=Command)
def evaluate(
    run_dir: Annotated[Path | None, typer.Argument(metavar="[RUN_DIR]", hidden=True)] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help='"tiny", a folder, or a Hugging Face id.')] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A PEFT adapter folder to put on the model.")] = None,
    data: Annotated[str | None, typer.Option(metavar="DATA", help="Held-out rows; default: those of the run.")] = None,
    sets: Sets = None,
    host: HostAddress = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> Action:
    """Measure a run, or any model with any adapter.

    Loss, perplexity and the metrics asked for. Give a RUN_DIR that `atoll train` wrote, or --model.
    """
    if (run_dir is None) == (model is None):
        got = "neither" if model is None else f"{run_dir} and --model {model}"
        expected = "atoll evaluate RUN_DIR, or atoll evaluate --model M [--adapter DIR] [--data DATA]"
        what = "evaluate takes a run directory or a model"
        raise CommandLineError(what, where="atoll evaluate", got=got, expected=expected, do="give one of the two")
    if run_dir is not None and adapter is not None:
        expected = "--adapter together with --model"
        do = "leave --adapter away: a run directory has its own"
        raise CommandLineError(
            "--adapter goes with --model", where="atoll evaluate", got=f"{run_dir} and --adapter", expected=expected, do=do
        )
    subject = {"run_dir": run_dir, "model": model, "adapter": adapter, "data": data, "overrides": tuple(sets or ())}
    return partial(actions.evaluate, subject, access=Access(host, ca, cert, key, insecure), as_json=as_json)


@app.command(cls=Command)
def generate(
    run_dir: RunFolder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", hidden=True)],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 64,
    host: HostAddress = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
) -> Action:
    """Talk to the result.

    RUN_DIR is a folder that `atoll train` wrote; the model goes on from PROMPT.
    """
    access = Access(host, ca, cert, key, insecure)
    return partial(actions.generate, run_dir, prompt, max_new_tokens=max_new_tokens, access=access)


@app.command(cls=Command)
def merge(
    run_dir: RunFolder, out: Annotated[Path, typer.Option("--out", metavar="DIR", help="An absent or empty folder for the merged model.")]
) -> Action:
    """Base and adapter as one Hugging Face model folder.

    RUN_DIR is a folder that `atoll train` wrote.
    """
    return partial(actions.merge, run_dir, out=out)


@app.command(cls=Command)
def doctor(
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="FILE", help="Measure memory and speed, and write them there for run.toml.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="M", help='Measure on this base; default "tiny".')] = None,
    host: HostAddress = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
    fleet_folder: Annotated[
        Path | None, typer.Option("--fleet", metavar="DIR", help="Examine what `atoll fleet init` wrote: DIR, or one machine's folder.")
    ] = None,
    as_json: Json = False,
) -> Action:
    """What this machine has, what would fail, and what to do.

    With --profile: what an [[edge]] of run.toml declares, measured here; the link, too, if --host is given. With --fleet: certificates,
    keys, files and connections of a fleet.
    """
    access = Access(host, ca, cert, key, insecure)
    if profile is not None and fleet_folder is None:
        return partial(actions.profile, profile, base=base or "tiny", access=access, as_json=as_json)
    given = [name for name, value in (("--base", base), ("--host", host), ("--ca", ca), ("--cert", cert), ("--key", key)) if value]
    if given or insecure:
        raise CommandLineError(
            "what to measure goes with --profile", where="atoll doctor", got=", ".join(given) or "--insecure",
            expected="atoll doctor --profile FILE [--base M] [--host HOST:PORT]", do="add --profile FILE",
        )  # fmt: skip
    if profile is not None:
        raise CommandLineError(
            "a fleet is examined, or this machine measured", where="atoll doctor", got="--profile and --fleet", expected="one of the two",
            do="run atoll doctor twice",
        )  # fmt: skip
    return partial(actions.doctor, fleet_folder, as_json=as_json)


fleet_commands = typer.Typer(cls=Commands, name="fleet", rich_markup_mode=None)
fleet_commands.command(cls=Command, name="init")(fleet.init)
fleet_commands.command(cls=Command, name="join")(fleet.join)
fleet_commands.command(cls=Command, name="add")(fleet.add)
fleet_commands.command(cls=Command, name="renew")(fleet.renew)
fleet_commands.command(cls=Command, name="remove")(fleet.remove)
app.add_typer(fleet_commands)


@fleet_commands.callback(invoke_without_command=True)
def fleet_group(context: typer.Context) -> None:
    """The machines of a run that is on many."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def _overrides(method: str | None, sets: list[str] | None) -> tuple[str, ...]:
    return (*([f"method={method}"] if method is not None else ()), *(sets or ()))


def _no_such_command(program: str, name: str, known: list[str]) -> CommandLineError:
    import difflib

    likely = difflib.get_close_matches(name, known, n=1)
    what = f"`atoll {name}` is not in this version" if name in _LATER else f"there is no command {name!r}"
    do = f"did you mean `{program} {likely[0]}`?" if likely else f"`{program} --help` says what each of them does"
    return CommandLineError(what, where=program, got=name, expected=f"one of {', '.join(known)}", do=do)
