"""atoll doctor --fleet: whether a fleet's folders are whole, believe each other, and reach each other. Changes nothing."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key, load_ssh_public_key

from atoll.commands.doctor import Check, DoctorReport, Status, library
from atoll.commands.hosts.check import certificate_checks, check_certificates, files_check, keys_check, list_check, unreadable
from atoll.config.load import LoadedConfig, load
from atoll.config.named_parts import plugin_parts
from atoll.errors import AtollError, BaseFolderError, FleetFolderError, InputError, ManyErrors, TransportError
from atoll.fleet.files import CoordinatorFolder, EdgeFolder, HostFolder, split_address
from atoll.fleet.links.flower import FAILURES, EdgeLink
from atoll.fleet.links.way import open_way, said
from atoll.fleet.named import NeededInput, named_by_coordinator, named_by_edge
from atoll.jobs.backends.worker import asked_for
from atoll.jobs.inputs import base_shapes, edge_rows
from atoll.split.certificates import DeviceTls, covers, examined, open_channel
from atoll.split.transport import fetch_status
from atoll.units import counted

CALL_SECONDS = 5.0
_COPY = "copy the folder again as `atoll fleet init` wrote it"
_NEW = "run `atoll fleet init` again, and give every machine its new folder"
_RENEW = "run `atoll fleet renew` where ca.key is, and copy the files that it names"


def check_fleet(folder: Path) -> DoctorReport:
    """Examine the folder of a coordinator, an edge or a host as the machine that it is for; a whole fleet's, or a host's certificates.

    What only its own machine can have (rows, a running SuperLink) is a warning at most in a whole fleet's folder.

    Raises: FleetFolderError for a folder that is none of these, or whose fleet.json or edge.json cannot be read.
    """
    if (folder / "coordinator").is_dir():
        return DoctorReport((library("flwr"), *_whole(folder)))
    if (folder / "fleet.json").exists():
        return DoctorReport((library("flwr"), *_coordinator(CoordinatorFolder(folder), at_home=True)))
    if (folder / "edge.json").exists():
        return DoctorReport((library("flwr"), *_edge(EdgeFolder(folder), at_home=True)))
    if (folder / "start.txt").exists():
        return DoctorReport(tuple(_host(HostFolder(folder))))
    if (found := check_certificates(folder)) is not None:
        return found
    raise FleetFolderError(
        "not a folder of a fleet", where=str(folder), got="no folder" if not folder.is_dir() else "no fleet.json, edge.json or host.pem",
        expected="the whole folder, coordinator, edges/NAME or hosts/NAME, or a host's certificates",
        do="give a folder that `atoll fleet init` wrote, or `atoll host --make-certificates`",
    )  # fmt: skip


def _whole(folder: Path) -> list[Check]:
    coordinator = CoordinatorFolder(folder / "coordinator")
    fleet = coordinator.read()
    found = _within("coordinator", _coordinator(coordinator, at_home=False))
    for name in fleet.edges:
        edge = EdgeFolder(folder / "edges" / name)
        if not edge.edge_json.exists():
            found.append(Check(f"edges/{name}", "fail", "no edge.json", f"run `atoll fleet init` again: {name} is in fleet.json"))
            continue
        checks = [*_edge(edge, at_home=False), *_agreement(coordinator, edge, name), *_host_names(folder, edge)]
        found += _within(f"edges/{name}", checks)
    for path in sorted(folder.glob("hosts/*/")):
        found += _within(f"hosts/{path.name}", _host(HostFolder(path)))
    return found


def _within(folder: str, checks: Sequence[Check]) -> list[Check]:
    return [replace(check, name=f"{folder} {check.name}") for check in checks]


def _coordinator(folder: CoordinatorFolder, *, at_home: bool) -> list[Check]:
    fleet = folder.read()
    publics = [folder.node_public(name) for name in fleet.edges]
    app = [folder.app / "pyproject.toml", folder.app / "LICENSE", folder.app / "atoll_app" / "apps.py"]
    files = files_check(folder.path, [folder.run_toml, folder.ca, folder.cert, folder.key, folder.revoked, *publics, *app], _COPY)
    if files.status == "fail":
        return [files]
    host, _ = split_address(fleet.address, str(folder.fleet_json))
    found = [files, keys_check([folder.key]), *certificate_checks(folder.cert, folder.key, folder.ca, renew=_RENEW)]
    found += [*_address(folder, host), list_check(folder.revoked, folder.ca)]
    found += [_public_keys(publics), *_config(folder.run_toml, fleet.edges, named_by_coordinator, at_home=at_home)]
    nobody, do = DeviceTls(folder.ca, None, None), "start it: atoll train run.toml --engine flower --fleet ."
    return [*found, _superlink(fleet.address, nobody, "warn", do)]


def _edge(folder: EdgeFolder, *, at_home: bool) -> list[Check]:
    edge = folder.read()
    files = files_check(folder.path, [folder.run_toml, folder.ca, folder.node_key, folder.node_public, folder.cert, folder.key], _COPY)
    if files.status == "fail":
        return [files]
    found = [files, keys_check([folder.node_key, folder.key]), *certificate_checks(folder.cert, folder.key, folder.ca, renew=_RENEW)]
    config = _config(folder.run_toml, [edge.name], lambda loaded: named_by_edge(loaded, edge.name), at_home=at_home)
    found += [_node_key(folder), *config]
    if at_home and all(check.status == "ok" for check in config):
        found.append(_rows(load(folder.run_toml, imports=False), edge.name))
    away: Status = "fail" if at_home else "warn"
    tls, do = DeviceTls(folder.ca, folder.cert, folder.key), "start the coordinator first; or open the way there in the firewall"
    found.append(_superlink(edge.superlink, tls, away, do, folder.node_key))
    return found if edge.host is None else [*found, _host_answers(folder, edge.host, away)]


def _host(folder: HostFolder) -> list[Check]:
    files = files_check(folder.path, [folder.ca, folder.cert, folder.key, folder.revoked, folder.start], _COPY)
    if files.status == "fail":
        return [files]
    checks = certificate_checks(folder.cert, folder.key, folder.ca, renew=_RENEW)
    return [files, keys_check([folder.key]), *checks, list_check(folder.revoked, folder.ca)]


def _address(folder: CoordinatorFolder, host: str) -> list[Check]:
    """Whether the certificate is for the address that edges call; nothing of one that is bad anyhow."""
    try:
        certificate = examined(folder.cert, folder.key, folder.ca)
    except TransportError:
        return []
    if covers(certificate, host):
        return [Check("address", "ok", f"{folder.cert.name} is for {host}")]
    do = f"run `atoll fleet init` again with the address that edges call, or write that of {folder.cert.name} into fleet.json"
    return [Check("address", "fail", f"{folder.cert.name} is not for {host}", do)]


def _public_keys(paths: Sequence[Path]) -> Check:
    bad = [path.name for path in paths if _public_of(path) is None]
    if bad:
        return Check("node keys", "fail", f"no public key of a node: {', '.join(bad)}", f"copy node.pub of the edge there; or {_NEW}")
    keys = Counter(_public_of(path) for path in paths)
    same = [path.name for path in paths if keys[_public_of(path)] > 1]
    if same:
        return Check("node keys", "fail", f"one key under more than one name: {' and '.join(same)}", "copy node.pub of each edge there")
    return Check("node keys", "ok", f"of {', '.join(path.stem for path in paths)}")


def _node_key(folder: EdgeFolder) -> Check:
    """Whether the two halves of the key belong together."""
    try:
        key = load_ssh_private_key(folder.node_key.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as problem:
        return Check("node key", "fail", f"node.key is no private key: {str(problem).splitlines()[0]}", f"{_COPY}; or {_NEW}")
    public = _public_of(folder.node_public)
    if public is None:
        return Check("node key", "fail", "node.pub is no public key of a node", f"{_COPY}; or {_NEW}")
    if key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) != public:
        return Check("node key", "fail", "node.pub is not of node.key", f"{_COPY}; or {_NEW}")
    return Check("node key", "ok", "node.key and node.pub belong together")


def _public_of(path: Path) -> bytes | None:
    """The key alone, without a comment; None where it is none that Flower takes."""
    try:
        key = load_ssh_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        return None
    is_one = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) if is_one else None


def _agreement(coordinator: CoordinatorFolder, folder: EdgeFolder, name: str) -> list[Check]:
    """Whether an edge and the coordinator do the same run, with the same authority and address, and know the edge by the same key."""
    pairs = [
        (coordinator.run_toml, folder.run_toml), (coordinator.ca, folder.ca), (coordinator.node_public(name), folder.node_public),
    ]  # fmt: skip
    if any(unreadable(path) for pair in pairs for path in pair):
        return []  # Said already.
    other = [] if _same_run(coordinator.run_toml, folder.run_toml) else ["run.toml"]
    other += ["ca.pem"] if coordinator.ca.read_bytes() != folder.ca.read_bytes() else []
    other += ["node.pub"] if _public_of(coordinator.node_public(name)) != _public_of(folder.node_public) else []
    edge, fleet = folder.read(), coordinator.read()
    other += ["name"] if edge.name != name else []
    other += ["address"] if edge.superlink != fleet.address else []
    if other:
        return [Check("agreement", "fail", f"not as the coordinator has it: {', '.join(other)}", "copy what is right over what is not")]
    return [Check("agreement", "ok", "run.toml, ca.pem, node.pub and address as the coordinator has them")]


def _same_run(mine: Path, theirs: Path) -> bool:
    """Whether both ask for the same, wherever files lie on each machine."""
    if mine.read_bytes() == theirs.read_bytes():
        return True
    try:
        return asked_for(load(mine, imports=False).config) == asked_for(load(theirs, imports=False).config)
    except InputError:
        return False  # Whichever it is, it is said where that folder is examined.


def _host_names(folder: Path, edge_folder: EdgeFolder) -> list[Check]:
    """Whether a host of this fleet has a certificate for the address that the edge calls."""
    edge = edge_folder.read()
    if edge.host is None:
        return []
    called, _ = split_address(edge.host, str(edge_folder.edge_json))
    for path in sorted(folder.glob("hosts/*/host.pem")):
        try:
            if covers(x509.load_pem_x509_certificate(path.read_bytes()), called):
                return [Check("host address", "ok", f"{path.relative_to(folder)} is for {called}")]
        except ValueError:
            continue  # Said where the host's own folder is examined.
    return [Check("host address", "fail", f"no hosts/*/host.pem is for {called}", f"mend host in edge.json; or {_NEW}")]


def _config(run_toml: Path, edges: Sequence[str], named: Callable[[LoadedConfig], list[NeededInput]], *, at_home: bool) -> list[Check]:
    """run.toml, the edges it must have, and what it names on this machine."""
    away: Status = "fail" if at_home else "warn"
    try:
        loaded = load(run_toml, imports=False)
    except InputError as problem:
        first = problem.errors[0] if isinstance(problem, ManyErrors) else problem
        return [Check("run.toml", away, f"{first.what}: {first.got or first.where}", first.do or "mend it, on all machines alike")]
    missing = [name for name in edges if name not in [edge.name for edge in loaded.config.edge]]
    if missing:
        return [Check("run.toml", "fail", f"no [[edge]] called {', '.join(missing)}", "give all machines the same run.toml")]
    well = Check("run.toml", "ok", counted(len(loaded.config.edge), "edge"))
    try:
        return [well, *(_named(loaded, one, away) for one in named(loaded))]
    except BaseFolderError as problem:  # It lies where doctor was started, and the run will not look there.
        return [well, Check("base", away, f"{problem.what}: {problem.got}", problem.do)]


def _rows(loaded: LoadedConfig, edge: str) -> Check:
    """Whether the edge's rows can be read as it will read them."""
    if plugin_parts(loaded.config):
        return Check("reading rows", "ok", "not tried: run.toml names parts of somebody else's, which are not run here")
    try:
        (own,) = edge_rows(loaded, edge)
    except InputError as problem:
        first = problem.errors[0] if isinstance(problem, ManyErrors) else problem
        # Its page may quote a row; what is wrong in it is this machine's owner's to see.
        return Check("reading rows", "fail", f"{first.what}: {first.where}", first.do or "mend them")
    return Check("reading rows", "ok", counted(len(own.rows), "row"))


def _named(loaded: LoadedConfig, named: NeededInput, away: Status) -> Check:
    if named.path is None:
        do = "copy it there if it is a file or a folder of yours"
        return Check(named.what, "warn", f"{named.value}: nothing of this name beside run.toml, so taken for a Hugging Face id", do)
    if named.what == "base" and named.path.exists():
        try:
            shapes = base_shapes(loaded, 0)
        except InputError as problem:
            return Check("base", "fail", f"{problem.what}: {problem.got or problem.where}", problem.do or "put the model's folder there")
        return Check("base", "ok", f"{named.value} is there: {shapes.model_type}, {shapes.num_blocks} blocks")
    if named.path.exists():
        return Check(named.what, "ok", f"{named.value} is there")
    return Check(named.what, away, f"{named.value} is not there", f"put it at {named.path} on the machine that this folder is for")


def _superlink(address: str, tls: DeviceTls, silent: Status, do: str, node_key: Path | None = None) -> Check:
    """Whether a front of this fleet answers there, and takes the certificate, if any; `silent` is the status where nobody answers."""
    try:
        with open_way(address, tls, seconds=CALL_SECONDS) as client:
            answer = client.get(f"https://{address}/")
    except TransportError as problem:
        return Check("SuperLink", "fail", f"not called: {problem.got}", f"{_COPY}; or {_NEW}")
    except httpx.TransportError as problem:
        return _unanswered(address, tls, problem, silent, do)
    if answer.status_code == httpx.codes.NOT_FOUND:  # Of this path, as it is: an edge is told so, and nobody else is told anything.
        return _key_is_known(address, tls, node_key)
    return Check("SuperLink", "fail", said(address, httpx.HTTPStatusError("", request=answer.request, response=answer)), _NEW)


def _key_is_known(address: str, tls: DeviceTls, node_key: Path | None) -> Check:
    """Whether an edge whose certificate is taken would be let in: SuperLink asks for its node's key beside."""
    well = f"{address} answers, and takes this edge's certificate"
    if node_key is None:
        return Check("SuperLink", "ok", well)
    try:
        with open_way(address, tls, seconds=CALL_SECONDS) as client:
            if EdgeLink(address, client, node_key).is_known():
                return Check("SuperLink", "ok", f"{well} and node.key")
    except (*FAILURES, UnsupportedAlgorithm) as problem:
        return Check("SuperLink", "fail", f"{well}, but {said(address, problem)}", "mend what it says; or start the coordinator again")
    do = "copy node.pub to nodes/NAME.pub of the coordinator; a key that is new there counts when the coordinator starts again"
    return Check("SuperLink", "fail", f"{well}, but does not know node.key", do)


def _unanswered(address: str, tls: DeviceTls, problem: httpx.TransportError, silent: Status, do: str) -> Check:
    why = str(problem)
    hung_up = "ALERT" in why or isinstance(problem, httpx.RemoteProtocolError | httpx.ReadError)
    if hung_up and tls.cert is None:
        return Check("SuperLink", "ok", f"{address} answers with a certificate of this fleet, and asks for one")
    if "CERTIFICATE_VERIFY_FAILED" in why:
        do = f"give the coordinator the certificates of this fleet; or {_NEW}"
        return Check("SuperLink", "fail", f"{address} shows a certificate that is not believed: {why}", do)
    if hung_up:
        return Check("SuperLink", "fail", f"{address} does not take this certificate: {why}", f"{_COPY}; or {_NEW}")
    if "SSL" in why:
        return Check("SuperLink", "fail", f"{address} does not speak TLS: {why}", "mend the address, or what listens there")
    return Check("SuperLink", silent, f"not running: nobody answers: {said(address, problem)}", do)


def _host_answers(folder: EdgeFolder, address: str, silent: Status) -> Check:
    """Whether the host takes this edge's certificate; `silent` is the status where nobody answers."""
    try:
        socket.create_connection(split_address(address, "the host"), CALL_SECONDS).close()
    except OSError as problem:
        found = f"not running: nobody answers at {address} ({problem.strerror or problem})"
        return Check("host", silent, found, "start it: hosts/NAME/start.txt; or open the way there in the firewall")
    try:
        with open_channel(address, DeviceTls(folder.ca, folder.cert, folder.key), insecure=False) as channel:
            fetch_status(channel, CALL_SECONDS)
    except AtollError as problem:
        return Check("host", "fail", f"{address}: {problem.what}: {problem.got}", problem.do or f"{_COPY}; or {_NEW}")
    return Check("host", "ok", f"{address} takes this edge's certificate")
