"""atoll fleet add, renew and remove: certificates and keys of single members, in the folder that holds the whole fleet."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509

from atoll.commands.hosts.certificates import put
from atoll.config.document import few
from atoll.config.load import load
from atoll.errors import CommandLineError, ConflictError, FleetFolderError
from atoll.fleet.files import CoordinatorFolder, EdgeFile, EdgeFolder, FleetFile, HostFolder, json_text, split_address
from atoll.fleet.init import edge_files, may_split, must_split
from atoll.fleet.named import README
from atoll.jobs.backends.edge_policy import POLICY_FILE
from atoll.split.authority.issued import ISSUED, Issued
from atoll.split.authority.issuer import VALID, Issuer, addresses_of, check_names, write_all
from atoll.units import counted

COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class Change:
    """What was done, and what each machine has to be given for it."""

    done: str
    copies: Mapping[str, Sequence[str]]
    """Files by the machine whose folder they are in."""
    notes: Sequence[str] = ()

    def to_text(self) -> str:
        """For people: the files to copy, unless this folder is where the machine runs."""
        lines = [self.done]
        if self.copies:
            lines.append("copy, to machines that do not run in this folder:")
            lines += [f"  {machine:<24} {', '.join(names)}" for machine, names in self.copies.items()]
        return "\n".join([*lines, *self.notes])


class WholeFleet:
    """The folder that `atoll fleet init` wrote, with the authority's key, which may be kept elsewhere.

    Raises: FleetFolderError; TransportError where the authority cannot sign.
    """

    def __init__(self, folder: Path, ca_key: Path | None = None) -> None:
        self.path, self.coordinator = folder, CoordinatorFolder(folder / COORDINATOR)
        self.fleet = self.coordinator.read()
        self.issuer = Issuer.opened(folder / "ca.pem", ca_key or folder / "ca.key", self.coordinator.revoked)
        self.issued = Issued.read(folder / ISSUED)

    def edge(self, name: str) -> EdgeFolder:
        """An edge's folder."""
        return EdgeFolder(self.path / "edges" / name)

    def hosts(self) -> list[HostFolder]:
        """All hosts' folders."""
        return [HostFolder(path) for path in sorted(self.path.glob("hosts/*/"))]

    def serials(self, name: str) -> set[int]:
        """The numbers of all certificates that this name was given."""
        now = {_certificate(self.edge(name).cert).serial_number} if self.edge(name).cert.exists() else set()
        return set(self.issued.of(name)) | now

    def record(self, name: str) -> None:
        """Keep the number of the certificate that the edge has now, for the day when all of its are revoked."""
        self.issued = self.issued.with_(name, [_certificate(self.edge(name).cert).serial_number])
        put(self.path / ISSUED, self.issued.content())

    def revoke(self, serials: Iterable[int] = (), name: str | None = None) -> dict[str, list[str]]:
        """Write the list anew, with these and all that the name was given; returns what each machine that reads it is given."""
        content = self.issuer.revoked(serials, name)
        readers: tuple[CoordinatorFolder | HostFolder, ...] = (self.coordinator, *self.hosts())
        for reader in readers:
            put(reader.revoked, content)
        return {str(reader.path.relative_to(self.path)): [reader.revoked.name] for reader in readers}

    def keep(self, fleet: FleetFile) -> None:
        """Write fleet.json."""
        put(self.coordinator.fleet_json, json_text(fleet).encode())


def add(folder: Path, name: str, *, config: Path | None = None, host: str | None = None, ca_key: Path | None = None) -> Change:
    """Write the folder of one more edge, and make its key known to the coordinator.

    `config`: a run.toml that has the edge, for all machines; None: the coordinator's has it already. `host`: HOST:PORT, where it may split.

    Raises: as `WholeFleet`; ConflictError, CommandLineError, TransportError for an edge that cannot be; OutputError.
    """
    whole = WholeFleet(folder, ca_key)
    check_names([*whole.fleet.edges, name], "edge")
    loaded = load(config or whole.coordinator.run_toml)
    found = next((edge for edge in loaded.config.edge if edge.name == name), None)
    if found is None:
        raise ConflictError(
            "run.toml does not know this edge", where=str(loaded.path),
            got=f"no [[edge]] called {name!r}, but {few([edge.name for edge in loaded.config.edge]) or 'none'}",
            expected=f'[[edge]] with name = "{name}"', do=f'add [[edge]] with name = "{name}", and give the file: --config RUN.toml',
        )  # fmt: skip
    if host is not None:
        split_address(host, "--host")
    if (host is None and must_split(loaded.config, found)) or (host is not None and not may_split(loaded.config, found)):
        raise CommandLineError(
            "this edge and this host do not go together", where="--host", got=host or "no host",
            expected=f"a host for an edge that is split, which {name} {'is' if host is None else 'is not'}",
            do="add --host HOST:PORT" if host is None else "leave --host away, or change the edge's mode",
        )  # fmt: skip
    files, public = edge_files(loaded, whole.issuer, EdgeFile(name, whole.fleet.address, host))
    for file in (POLICY_FILE, README):
        if (whole.edge(name).path / file).exists():  # Of an edge that was removed: its owner's to change, not ours.
            del files[file]
    write_all(whole.edge(name).path, files)
    put(whole.coordinator.node_public(name), public)
    whole.keep(replace(whole.fleet, edges=(*whole.fleet.edges, name)))
    whole.record(name)
    copies = {f"edges/{name}": ["the whole folder"], COORDINATOR: ["fleet.json", f"nodes/{name}.pub"]}
    if config is not None:
        content = loaded.path.read_bytes()
        for label in (COORDINATOR, *(f"edges/{edge}" for edge in whole.fleet.edges)):
            put(folder / label / "run.toml", content)
            copies[label] = [*copies.get(label, []), "run.toml"]
    return Change(f"{name} is an edge of this fleet, from the next run on", copies, ["start it there: atoll fleet join ."])


def renew(folder: Path, name: str | None = None, *, ca_key: Path | None = None) -> Change:
    """New certificates and keys of one member ("coordinator", an edge or a host), or of all and, before it ends, of the authority.

    Those they had stay good until they end: whoever must be kept out is removed, and added again.

    Raises: as `WholeFleet`; FleetFolderError for a name that nobody has; OutputError.
    """
    whole = WholeFleet(folder, ca_key)
    machines = _machines(whole)
    if name is not None and name not in {path.name for path in machines}:
        raise FleetFolderError(
            "nobody in this fleet has this name", where=str(folder), got=name, expected=", ".join(path.name for path in machines),
            do="mend the name, or leave it away for all",
        )  # fmt: skip
    copies: dict[str, list[str]] = {}
    soon = datetime.datetime.now(datetime.UTC) + VALID
    if name is None and whole.issuer.end < soon:
        whole.issuer = whole.issuer.renewed()
        for path in (folder, *machines):
            put(path / "ca.pem", whole.issuer.own("ca")["ca.pem"])
        listing = whole.revoke()
        copies = {label: ["ca.pem", *listing.get(label, [])] for label in (str(path.relative_to(folder)) for path in machines)}
    for path, make in machines.items():
        if name is None or path.name == name:
            files = make(whole.issuer)
            for file, content in files.items():
                put(path / file, content)
            label = str(path.relative_to(folder))
            copies[label] = [*copies.get(label, []), *files]
            if path.parent.name == "edges":
                whole.record(path.name)
    until = min(soon, whole.issuer.end)
    notes = ["start hosts and coordinator again after that; edges call with the new one when they are started again"]
    return Change(f"renewed until {until:%Y-%m-%d}: {name or 'all'}", copies, notes)


def remove(folder: Path, name: str, *, ca_key: Path | None = None) -> Change:
    """Revoke all certificates that an edge was given, and forget its key; a coordinator and hosts in this folder obey at once.

    Raises: as `WholeFleet`; FleetFolderError for a name that no edge has, or the last edge's; OutputError.
    """
    whole = WholeFleet(folder, ca_key)
    left = tuple(edge for edge in whole.fleet.edges if edge != name)
    if len(left) == len(whole.fleet.edges) or not left:
        raise FleetFolderError(
            "this edge cannot be removed", where=str(whole.coordinator.fleet_json), got=name,
            expected=f"one of {', '.join(whole.fleet.edges)}, and another that stays", do="mend the name",
        )  # fmt: skip
    edge, ended = whole.edge(name), whole.serials(name)
    copies = whole.revoke(ended, name)
    whole.coordinator.node_public(name).unlink(missing_ok=True)
    whole.keep(replace(whole.fleet, edges=left))
    for path in (edge.cert, edge.key, edge.node_key, edge.node_public, edge.edge_json, edge.ca, edge.run_toml, edge.path / README):
        path.unlink(missing_ok=True)
    notes = [f"delete nodes/{name}.pub at the coordinator; SuperLink forgets the key within a second, or at the next start"]
    copies[COORDINATOR] += ["fleet.json"]
    return Change(f"{name} is of this fleet no more: {counted(len(ended), 'certificate')} revoked", copies, notes)


def _machines(whole: WholeFleet) -> dict[Path, Callable[[Issuer], dict[str, bytes]]]:
    """Every machine's folder, with what makes its certificate and key anew: for the addresses that its present one is for."""
    found: dict[Path, Callable[[Issuer], dict[str, bytes]]] = {}

    def server(path: Path, cert: Path, who: str) -> None:
        found[path] = lambda issuer: issuer.server(cert.stem, who, addresses_of(_certificate(cert)))

    server(whole.coordinator.path, whole.coordinator.cert, "atoll coordinator")
    for host in whole.hosts():
        server(host.path, host.cert, "atoll host")
    for name in whole.fleet.edges:
        found[whole.edge(name).path] = lambda issuer, name=name: issuer.device("client", name)  # type: ignore[misc]
    return found


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as problem:
        raise FleetFolderError(
            "a certificate of the fleet cannot be read", where=str(path), got=str(problem), expected="as `atoll fleet init` wrote it",
            do="bring it back from a copy",
        ) from None  # fmt: skip
