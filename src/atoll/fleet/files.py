"""The folders that a fleet's machines hold: where what lies in them, and fleet.json and edge.json. Opens nothing heavy."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from atoll.errors import FleetFolderError, TransportError
from atoll.parsed import parse_json

FORMAT: Final = 1
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):(\d{1,5})")
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_AGAIN = "copy the folder again as `atoll fleet init` wrote it"


@dataclass(frozen=True, slots=True)
class FleetFile:
    """fleet.json."""

    address: str
    """HOST:PORT, as edges call the coordinator."""
    edges: tuple[str, ...]
    socket: str | None = None
    """Where SuperLink listens, for a front that is somebody else's; None: a place of this user's alone, behind Atoll's own."""


@dataclass(frozen=True, slots=True)
class EdgeFile:
    """edge.json."""

    name: str
    superlink: str
    """HOST:PORT of the coordinator."""
    host: str | None
    """HOST:PORT of the host that keeps most of the base; None: the whole base is here."""


@dataclass(frozen=True, slots=True)
class MachineFolder:
    """What every machine of a fleet holds."""

    path: Path

    @property
    def ca(self) -> Path:
        """Who signed all certificates of the fleet."""
        return self.path / "ca.pem"


@dataclass(frozen=True, slots=True)
class CoordinatorFolder(MachineFolder):
    """What the coordinator's machine holds."""

    @property
    def run_toml(self) -> Path:
        """The config, word for word as it was given."""
        return self.path / "run.toml"

    @property
    def cert(self) -> Path:
        """The certificate of the front, which edges call."""
        return self.path / "superlink.pem"

    @property
    def key(self) -> Path:
        """Its key."""
        return self.path / "superlink.key"

    @property
    def fleet_json(self) -> Path:
        """Address and edges."""
        return self.path / "fleet.json"

    @property
    def revoked(self) -> Path:
        """The list of certificates that are believed no more."""
        return self.path / "revoked.pem"

    @property
    def audit(self) -> Path:
        """Whom the front let in, and what it refused."""
        return self.path / "superlink" / "audit.jsonl"

    @property
    def app(self) -> Path:
        """The Flower app."""
        return self.path / "app"

    def node_public(self, edge: str) -> Path:
        """An edge's public key, by which SuperLink knows it; without it the front knows the edge's name no more."""
        return self.path / "nodes" / f"{edge}.pub"

    def read(self) -> FleetFile:
        """fleet.json.

        Raises: FleetFolderError.
        """
        values = _read(self.fleet_json, ("address", "edges"), optional=("socket",))
        address, edges, socket = values["address"], values["edges"], values.get("socket")
        if not isinstance(edges, list) or not edges or not all(isinstance(name, str) for name in edges):
            raise _bad_file(self.fleet_json, f"edges = {json.dumps(edges)[:80]}", "a list of the edges' names")
        if socket is not None and not isinstance(socket, str):
            raise _bad_file(self.fleet_json, f"socket = {json.dumps(socket)[:80]}", "the path of a socket")
        return FleetFile(_address(self.fleet_json, "address", address), tuple(edges), socket)


@dataclass(frozen=True, slots=True)
class EdgeFolder(MachineFolder):
    """What an edge's machine holds."""

    @property
    def run_toml(self) -> Path:
        """The config, the same as the coordinator's."""
        return self.path / "run.toml"

    @property
    def node_key(self) -> Path:
        """By which the SuperLink knows this edge."""
        return self.path / "node.key"

    @property
    def audit(self) -> Path:
        """What the coordinator asked for, and what came of it."""
        return self.path / "audit.jsonl"

    @property
    def node_public(self) -> Path:
        """The public half of it."""
        return self.path / "node.pub"

    @property
    def cert(self) -> Path:
        """The certificate by which coordinator and host know this edge."""
        return self.path / "client.pem"

    @property
    def key(self) -> Path:
        """Its key."""
        return self.path / "client.key"

    @property
    def edge_json(self) -> Path:
        """Who this edge is, and whom it calls."""
        return self.path / "edge.json"

    def read(self) -> EdgeFile:
        """edge.json.

        Raises: FleetFolderError.
        """
        values = _read(self.edge_json, ("name", "superlink", "host"))
        name, host = values["name"], values["host"]
        if not isinstance(name, str) or not name:
            raise _bad_file(self.edge_json, f"name = {json.dumps(name)}", "the edge's name")
        superlink = _address(self.edge_json, "superlink", values["superlink"])
        return EdgeFile(name, superlink, None if host is None else _address(self.edge_json, "host", host))


@dataclass(frozen=True, slots=True)
class HostFolder(MachineFolder):
    """What a host's machine holds."""

    @property
    def cert(self) -> Path:
        """The host's certificate."""
        return self.path / "host.pem"

    @property
    def key(self) -> Path:
        """Its key."""
        return self.path / "host.key"

    @property
    def revoked(self) -> Path:
        """The list of certificates that are believed no more."""
        return self.path / "revoked.pem"

    @property
    def start(self) -> Path:
        """The command that starts it."""
        return self.path / "start.txt"


def json_text(value: FleetFile | EdgeFile) -> str:
    """fleet.json or edge.json, as the readers above take it."""
    fields = {key: found for key, found in asdict(value).items() if key != "socket" or found is not None}
    return json.dumps({"format": FORMAT, **fields}, indent=2, ensure_ascii=False) + "\n"


def split_address(text: str, where: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, of a machine that others can call; an IPv6 address stands in brackets, and comes without them.

    Raises: TransportError.
    """
    match = _ADDRESS.fullmatch(text)
    host, port = (match[1].strip("[]"), int(match[2])) if match else ("", 0)
    try:
        is_one = not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        # Digits and dots alone are an address that was mistyped, and not a name.
        is_one = _HOST_NAME.fullmatch(host) is not None and not re.fullmatch(r"[\d.]+", host)
    if not is_one or not 1 <= port <= 65535 or ((":" in host) != text.startswith("[")):
        raise TransportError(
            "no address that another machine can call", where=where, got=text or "nothing", expected="HOST:PORT: a name or an IP address, "
            "and a port from 1 to 65535", do="write coordinator.example.org:7440, 10.0.0.5:7440 or [fd00::5]:7440",
        )  # fmt: skip
    return host, port


def _read(path: Path, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, object]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as problem:
        got = f"no file {path.name}" if isinstance(problem, FileNotFoundError) else problem.strerror or str(problem)
        raise FleetFolderError(
            "not a folder of a fleet", where=str(path.parent), got=got, expected=f"a folder with {path.name}",
            do="give a folder that `atoll fleet init` wrote",
        ) from None  # fmt: skip
    except ValueError as problem:
        raise _bad_file(path, str(problem), "JSON in UTF-8") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        got = f"format {json.dumps(value.get('format'))}" if isinstance(value, dict) else "no object"
        do = "use the version of Atoll that wrote it, or run `atoll fleet init` again"
        raise _bad_file(path, got, f"an object of format {FORMAT}", do)
    found = set(value) - {"format"}
    if not set(keys) <= found <= {*keys, *optional}:
        raise _bad_file(path, f"the keys {', '.join(sorted(found))}", f"the keys {', '.join(keys)}")
    return value


def _address(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _bad_file(path, f"{key} = {json.dumps(value)[:80]}", "HOST:PORT")
    try:
        split_address(value, str(path))
    except TransportError as problem:
        raise _bad_file(path, f"{key} = {json.dumps(value)}", problem.expected) from None
    return value


def _bad_file(path: Path, got: str, expected: str, do: str = _AGAIN) -> FleetFolderError:
    return FleetFolderError("a file of the fleet is damaged", where=str(path), got=got, expected=expected, do=do)
