"""atoll fleet init: the folders of all machines of a fleet, with their certificates and keys, written at once."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from atoll.config.document import Document, few
from atoll.config.keys import as_toml
from atoll.config.load import LoadedConfig, load, resolved
from atoll.config.schema import Edge, RunConfig
from atoll.cost.split_traffic import largest_batch_tokens
from atoll.errors import CommandLineError, ConflictError, OutputError
from atoll.fleet.files import EdgeFile, FleetFile, json_text, split_address
from atoll.fleet.named import (
    JOIN,
    README,
    TRAIN,
    NeededInput,
    coordinator_readme,
    edge_readme,
    host_readme,
    named_by_coordinator,
    named_by_edge,
    needed,
)
from atoll.jobs.backends.edge_policy import POLICY_FILE, policy_toml
from atoll.runs.files import sync_folder
from atoll.split.authority.issued import ISSUED, Issued, serial_in
from atoll.split.authority.issuer import Issuer, check_names, write_new
from atoll.split.certificates import is_loopback

_HOST = re.compile(r"(?:(?P<name>[^=]*)=)?(?P<address>\[[^\]]*\]:[^:]*|[^:\[\]]*:[^:]*)(?::(?P<edges>.*))?")
_APP = "atoll_app"
_LICENSE = "Apache-2.0, as Atoll itself.\n"


@dataclass(frozen=True, slots=True)
class FleetHost:
    """A host, as `--host [NAME=]HOST:PORT[:EDGE,EDGE]` names it."""

    name: str
    address: str
    edges: tuple[str, ...]
    """Those that it serves; of an option without edges, all that may split and that no other host serves."""


@dataclass(frozen=True, slots=True)
class WrittenFleet:
    """What was written, and how each machine starts."""

    path: Path
    address: str
    edges: tuple[str, ...]
    hosts: Mapping[str, str]
    """The command that starts each, by its name."""

    def to_text(self) -> str:
        """What lies where, and one command for each machine in the order to start them."""
        out = self.path
        lines = [f"wrote {out}: README.md says what each machine gets"]
        lines += [f"{out / 'ca.key'} signs certificates: keep it, and give it to nobody"]
        lines += ["start in this order, each on its own machine and in its own folder:"]
        lines += [f"  {name:<16} {command}" for name, command in self.hosts.items()]
        lines += [f"  {'coordinator':<16} {TRAIN}", *(f"  {name:<16} {JOIN}" for name in self.edges)]
        return "\n".join([*lines, f"check:  atoll doctor --fleet {out}"])


def init(run_toml: Path, out: Path, address: str, hosts: Sequence[str] = (), *, overrides: Sequence[str] = ()) -> WrittenFleet:
    """Write the folders of the coordinator, of every host and of every edge of run.toml to `out`: all of it or nothing.

    `address` is the SuperLink's HOST:PORT as edges call it.

    Raises: what `load` raises; ConflictError for a run that no fleet can do; CommandLineError, TransportError, OutputError.
    """
    loaded = load(run_toml, overrides)
    _check(loaded)
    host, _ = split_address(address, "--address")
    named = _assigned(loaded.config, [_parse_host(text) for text in hosts], address)
    _check_out(out)
    edges = tuple(edge.name for edge in loaded.config.edge)
    starts = {one.name: _host_command(loaded.config, one) for one in named}
    issuer = Issuer("atoll fleet CA")
    files = {**issuer.own("ca"), README: _readme(loaded, named, starts).encode()}
    files |= _below("coordinator", _coordinator(loaded, issuer, host, FleetFile(address, edges)))
    for one in named:
        files |= _below(f"hosts/{one.name}", _host(loaded, issuer, one, starts[one.name]))
    address_of = {edge: one.address for one in named for edge in one.edges}
    issued = Issued({})
    for edge in edges:
        found, public = edge_files(loaded, issuer, EdgeFile(edge, address, address_of.get(edge)))
        files |= {**_below(f"edges/{edge}", found), f"coordinator/nodes/{edge}.pub": public}
        issued = issued.with_(edge, [serial_in(found["client.pem"])])
    files[ISSUED] = issued.content()
    _write(out, files)
    return WrittenFleet(out, address, edges, starts)


def _below(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def _coordinator(loaded: LoadedConfig, issuer: Issuer, host: str, fleet: FleetFile) -> dict[str, bytes]:
    project = (
        f'[project]\nname = "atoll-fleet"\nversion = {as_toml(version("atoll"))}\nlicense = {{ file = "LICENSE" }}\ndependencies = []\n\n'
        f'[tool.flwr.app]\npublisher = "atoll"\n\n[tool.flwr.app.components]\nserverapp = "{_APP}.apps:server"\n'
        f'clientapp = "{_APP}.apps:client"\n\n[tool.flwr.app.config]\nconfig = ""\nout = ""\nresume = false\n'
    )
    # Flower reads this file without running it, and looks for assignments.
    apps = '"""What Flower opens."""\n\nfrom atoll.fleet import apps\n\nclient = apps.client\nserver = apps.server\n'
    return {
        **_shared(loaded, issuer), **issuer.server("superlink", "atoll coordinator", [host]), "fleet.json": json_text(fleet).encode(),
        "revoked.pem": issuer.revoked(), README: coordinator_readme(loaded, fleet).encode(),
        "app/pyproject.toml": project.encode(), "app/LICENSE": _LICENSE.encode(), f"app/{_APP}/__init__.py": b"",
        f"app/{_APP}/apps.py": apps.encode(),
    }  # fmt: skip


def _shared(loaded: LoadedConfig, issuer: Issuer) -> dict[str, bytes]:
    # Byte for byte, and not its text, which has lost a byte-order mark.
    return {"run.toml": loaded.path.read_bytes(), "ca.pem": issuer.own("ca")["ca.pem"]}


def _host(loaded: LoadedConfig, issuer: Issuer, host: FleetHost, command: str) -> dict[str, bytes]:
    called, _ = split_address(host.address, "--host")
    files = {"ca.pem": issuer.own("ca")["ca.pem"], "revoked.pem": issuer.revoked(), "start.txt": f"{command}\n".encode()}
    files[README] = host_readme(loaded, host.name, host.edges, command).encode()
    return {**files, **issuer.server("host", "atoll host", [called])}


def edge_files(loaded: LoadedConfig, issuer: Issuer, edge: EdgeFile) -> tuple[dict[str, bytes], bytes]:
    """An edge's folder, and the public key by which the SuperLink knows it: of the kind that Flower takes."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"
    node = {"node.key": key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), "node.pub": public}
    own = next(one for one in loaded.config.edge if one.name == edge.name)
    files = {"edge.json": json_text(edge).encode(), POLICY_FILE: policy_toml(loaded.config, own).encode()}
    files[README] = edge_readme(loaded, edge).encode()
    return {**_shared(loaded, issuer), **node, **issuer.device("client", edge.name), **files}, public


def _host_command(config: RunConfig, host: FleetHost) -> str:
    """`atoll host`, in the host's own folder."""
    called, port = split_address(host.address, "--host")
    everywhere = "[::]" if ":" in called else "0.0.0.0"
    listen = host.address if is_loopback(host.address) else f"{everywhere}:{port}"
    parts = ["atoll host --model", shlex.quote(config.model.base), "--listen", listen]
    parts += ["--precision", config.model.precision] if config.model.precision != "fp32" else []
    parts += ["--merge"] if config.select.merges else []
    parts += ["--tls-cert host.pem --tls-key host.key --client-ca ca.pem --crl revoked.pem"]
    # An edge gets what the run needs and no more: its own part of the base, its largest micro-batch, and one session beside one that ends.
    rows = max(config.train.batch_size, *config.plan.batch_sizes)
    parts += [f"--max-part {config.model.cut.front},{config.model.cut.back}"]
    parts += [f"--max-tokens {largest_batch_tokens(config, rows, scores=True)}", "--max-tenant-sessions 2"]
    return " ".join([*parts, f"--max-sessions {max(16, 2 * len(host.edges))}"])


def _check(loaded: LoadedConfig) -> None:
    """Whether a fleet can do this run.

    Raises: ConflictError; TransportError for names of edges that no folders can have.
    """
    config = loaded.config
    document = Document(loaded.path, loaded.toml_text, resolved(config))
    if not config.edge:
        raise ConflictError(
            "a fleet needs edges", where=str(loaded.path), got="no [[edge]]", expected="an [[edge]] for each machine that has rows",
            do='add [[edge]] sections, each with name = "..."',
        )  # fmt: skip
    if "central" in config.run.compare:
        raise ConflictError(
            "in a fleet rows stay where they are, and no trainer sees them all", where=document.where(("run", "compare")),
            got=f"compare = {as_toml(config.run.compare)}", expected='no "central"', do='take "central" out',
        )  # fmt: skip
    cloud = [edge.name for edge in config.edge if _asked_mode(config, edge) == "cloud"]
    if cloud:
        raise ConflictError(
            "in a fleet rows stay where they are, and none are handed to the coordinator", where=str(loaded.path),
            got=f'mode = "cloud": {few(cloud)}', expected='"local", "split" or "auto"', do="choose another mode or placement",
        )  # fmt: skip
    check_names([edge.name for edge in config.edge], "edge")


def must_split(config: RunConfig, edge: Edge) -> bool:
    """Whether the edge can train against a host only."""
    return _asked_mode(config, edge) == "split"


def may_split(config: RunConfig, edge: Edge) -> bool:
    """Whether the edge trains against a host, or a planner may have it do so."""
    asked = _asked_mode(config, edge)
    return must_split(config, edge) or (asked == "auto" and config.plan.decides)


def _asked_mode(config: RunConfig, edge: Edge) -> str:
    return config.run.placement if edge.mode == "auto" else edge.mode


def _parse_host(text: str) -> FleetHost:
    match = _HOST.fullmatch(text)
    if match is None:
        raise CommandLineError(
            "a host that cannot be understood", where="--host", got=text or "nothing", expected="[NAME=]HOST:PORT[:EDGE,EDGE]",
            do="write --host gpu=10.0.0.7:7431, with :north,south after it where there is more than one host",
        )  # fmt: skip
    split_address(match["address"], f"--host {text}")
    edges = match["edges"]
    name = "host" if match["name"] is None else match["name"]
    return FleetHost(name, match["address"], () if edges is None else tuple(edges.split(",")))


def _assigned(config: RunConfig, hosts: Sequence[FleetHost], address: str) -> tuple[FleetHost, ...]:
    """The hosts with the edges that each serves.

    Raises: CommandLineError, TransportError.
    """
    check_names([host.name for host in hosts], "host")
    listed = [name for host in hosts for name in host.edges]
    others = tuple(edge.name for edge in config.edge if may_split(config, edge) and edge.name not in listed)
    serving = tuple(host if host.edges else FleetHost(host.name, host.address, others) for host in hosts)
    for got, expected, do in _problems(config, hosts, serving, address):
        raise CommandLineError("these hosts and edges do not go together", where="--host", got=got, expected=expected, do=do)
    return serving


def _problems(config: RunConfig, hosts: Sequence[FleetHost], serving: Sequence[FleetHost], address: str) -> list[tuple[str, str, str]]:
    """What was got, what expected and what to do, of each thing that is wrong."""
    found: list[tuple[str, str, str]] = []
    listed = [name for host in hosts for name in host.edges]
    able = [edge.name for edge in config.edge if may_split(config, edge)]
    expected = f'edges with mode = "split", or "auto" where a planner decides: {few(able) or "none"}'
    same = [one for one, count in Counter([address, *(host.address for host in hosts)]).items() if count > 1]
    found += [(f"{one} twice", "an address for each host, and another for the coordinator", "mend the addresses") for one in same]
    found += [
        (f"edge {name!r}", expected, "mend the name, or the edge's mode in run.toml") for name in listed if name not in able
    ]  # fmt: skip
    twice = [name for name, count in Counter(listed).items() if count > 1]
    found += [(f"edge {name} twice", "one host for each edge", "name the edge once") for name in twice]
    if sum(not host.edges for host in hosts) > 1:
        found.append(("two hosts without edges", "one at most, which serves the others", "add :EDGE,EDGE to all hosts but one"))
    idle = [host.name for host in serving if not host.edges]
    found += [(f"host {name}, which no edge uses", expected, "leave it out") for name in idle]
    served = {name for host in serving for name in host.edges}
    without = [edge.name for edge in config.edge if must_split(config, edge) and edge.name not in served]
    if without:
        found.append((f"no host for {few(without)}", "a host for every edge that is split", "add --host NAME=HOST:PORT"))
    return found


def _readme(loaded: LoadedConfig, hosts: Sequence[FleetHost], starts: Mapping[str, str]) -> str:
    edges = [edge.name for edge in loaded.config.edge]
    lines = ["# A fleet", "", "Written by `atoll fleet init`. Each folder goes to one machine and to nobody else; private keys are in it."]
    lines += ["`ca.key` signs certificates, for as long as this fleet lasts: keep it, with this folder, on a machine that is none of these"]
    lines += ["and mostly off, or on a disk that you take out (`--ca-key FILE` says where it is). `issued.json` says what was signed."]
    lines += ["Certificates hold for a year: `atoll fleet renew` in good time. `atoll fleet add` and `remove` are for single edges."]
    lines += ["Paths in run.toml begin at the folder it lies in. What is named below was not copied: rows never leave their machine."]
    lines += ["Paths may be changed on a machine; all else in run.toml must be the same on all of them."]
    lines += ["", "Start in this order, each command in the machine's own folder. `atoll doctor --fleet .` says there what is missing."]
    for host in hosts:
        base = [one for one in named_by_coordinator(loaded) if one.what == "base"]
        lines += _machine(f"hosts/{host.name}", f"the host of {', '.join(host.edges)}", starts[host.name], base)
    lines += _machine("coordinator", "where the adapter comes together", TRAIN, named_by_coordinator(loaded))
    for edge in edges:
        lines += _machine(f"edges/{edge}", f"the machine that has the rows of {edge}", JOIN, named_by_edge(loaded, edge))
    return "\n".join(lines) + "\n"


def _machine(folder: str, who: str, command: str, named: Sequence[NeededInput]) -> list[str]:
    return ["", f"## {folder}: {who}", "", f"    {command}", "", *needed(named)]


def _check_out(out: Path) -> None:
    """Whether the fleet could be written there.

    Raises: OutputError.
    """
    try:
        there = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    except OSError as problem:
        raise _unwritten(out, problem) from None
    if there or (os.path.lexists(out) and not out.is_dir()):
        raise OutputError(
            "a fleet is never written over something else", where=str(out), got=f"a folder with {few(there, 3)}" if there else "a file",
            expected="an absent or empty folder", do="give the name of a new folder: --out DIR",
        )  # fmt: skip


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """All of them or none: beside the place first, then there in one step."""
    stage = out.resolve().with_name(f".{out.resolve().name}.{os.getpid()}.stage")
    try:
        stage.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir(mode=0o700)
        for folder in sorted({folder for name in files for folder in PurePosixPath(name).parents}):
            (stage / folder).mkdir(mode=0o700, exist_ok=True)
        for name, content in files.items():
            write_new(stage / name, content)
        os.replace(stage, out.resolve())
        sync_folder(stage.parent)
    except OSError as problem:
        shutil.rmtree(stage, ignore_errors=True)
        raise _unwritten(out, problem) from None


def _unwritten(out: Path, problem: OSError) -> OutputError:
    return OutputError(
        "the fleet cannot be written", where=str(out), got=problem.strerror or str(problem), expected="a place that can be written",
        do="give another folder, or mend its permissions",
    )  # fmt: skip
