"""The folders that a fleet's machines hold: where what lies in them, fleet.json and edge.json, and what run.toml names beside them."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from atoll.config.document import read_document
from atoll.config.fleet import with_fleet
from atoll.config.keys import as_toml
from atoll.config.load import LoadedConfig, resolve_path
from atoll.errors import FleetFolderError, TransportError
from atoll.jobs.inputs import base_source
from atoll.runs.files import write_text
from atoll.tasks.rows import names_file

FORMAT: Final = 1
CONNECTION: Final = "atoll"
"""What flower/config.toml calls the SuperLink."""
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):(\d{1,5})")
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_AGAIN = "copy the folder again as `atoll fleet init` wrote it"


@dataclass(frozen=True, slots=True)
class FleetFile:
    """fleet.json."""

    address: str
    """HOST:PORT of the SuperLink, as edges call it."""
    edges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EdgeFile:
    """edge.json."""

    name: str
    superlink: str
    """HOST:PORT."""
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
        """The SuperLink's certificate."""
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
    def flower(self) -> Path:
        """Flower's own folder (FLWR_HOME)."""
        return self.path / "flower"

    @property
    def app(self) -> Path:
        """The Flower app."""
        return self.path / "app"

    def node_public(self, edge: str) -> Path:
        """An edge's public key, by which the SuperLink knows it."""
        return self.path / "nodes" / f"{edge}.pub"

    def read(self) -> FleetFile:
        """fleet.json.

        Raises: FleetFolderError.
        """
        values = _read(self.fleet_json, ("address", "edges"))
        address, edges = values["address"], values["edges"]
        if not isinstance(edges, list) or not edges or not all(isinstance(name, str) for name in edges):
            raise _bad_file(self.fleet_json, f"edges = {json.dumps(edges)[:80]}", "a list of the edges' names")
        return FleetFile(_address(self.fleet_json, "address", address), tuple(edges))


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
    def node_public(self) -> Path:
        """The public half of it."""
        return self.path / "node.pub"

    @property
    def cert(self) -> Path:
        """The certificate by which a host knows this edge."""
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
    def start(self) -> Path:
        """The command that starts it."""
        return self.path / "start.txt"


def json_text(value: FleetFile | EdgeFile) -> str:
    """fleet.json or edge.json, as the readers above take it."""
    return json.dumps({"format": FORMAT, **asdict(value)}, indent=2, ensure_ascii=False) + "\n"


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


def connection_toml(folder: CoordinatorFolder, address: str) -> str:
    """Flower's settings for a SuperLink at `address`; Flower takes no relative path, so that they hold where the folder lies now."""
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = {as_toml(address)}\n'
        f"root-certificates = {as_toml(str(folder.ca.resolve()))}\n"
    )


def write_connection(folder: CoordinatorFolder, address: str) -> None:
    """Put these settings where Flower looks for them: before every start, as the folder may have been moved.

    Raises: OSError.
    """
    folder.flower.mkdir(mode=0o700, exist_ok=True)
    write_text(folder.flower / "config.toml", connection_toml(folder, address))


@dataclass(frozen=True, slots=True)
class Named:
    """What run.toml names and a machine must have."""

    what: str
    value: str
    """As run.toml has it; a path is relative to run.toml."""
    path: Path | None
    """None: a Hugging Face id, as nothing of this name lies beside run.toml."""


def named_by_coordinator(loaded: LoadedConfig) -> list[Named]:
    """What the coordinator's machine must have: the base, held-out rows, and what the plan and the adapter start from."""
    config = loaded.config
    given = {"start adapter": config.adapter.start, "importance": config.plan.importance_file}
    files = [Named(what, value, loaded.resolve(value)) for what, value in given.items() if value is not None]
    rows = [_rows(loaded, "held-out rows", config.data.eval)] if config.data.eval is not None else []
    return [*_of_config(loaded), *_base(loaded), *files, *rows]


def named_by_edge(loaded: LoadedConfig, name: str) -> list[Named]:
    """What an edge's machine must have: the base, and its own rows, or all rows of which it trains on a share."""
    own = next(edge.data for edge in loaded.config.edge if edge.name == name)
    what, source = ("rows", own) if own is not None else ("all edges' rows", loaded.config.data.train)
    rows = [_rows(loaded, what, source)] if source != "demo" else []
    return [*_of_config(loaded), *_base(loaded), *rows]


def _of_config(loaded: LoadedConfig) -> list[Named]:
    """What reading run.toml opens, on every machine: the fleet file, and the profiles of all edges."""
    document = read_document(loaded.path)
    run = document.table.get("run")
    fleet = run.get("fleet") if isinstance(run, Mapping) else None
    edges = with_fleet(document)[0].table.get("edge")
    profiles = [edge.get("profile") for edge in edges] if isinstance(edges, list) else []
    values = [*([("fleet file", fleet)] if fleet else []), *(("profile", profile) for profile in dict.fromkeys(profiles) if profile)]
    return [Named(what, value, resolve_path(loaded.path, value)) for what, value in values]


def _base(loaded: LoadedConfig) -> list[Named]:
    name = loaded.config.model.base
    source = base_source(loaded)
    if name == "tiny":
        return []
    is_path = source != name or Path(source).is_dir() or Path(source).is_absolute()
    return [Named("base", name, Path(source) if is_path else None)]


def _rows(loaded: LoadedConfig, what: str, source: str) -> Named:
    return Named(what, source, loaded.resolve(source) if names_file(source, loaded.path.parent) else None)


def _read(path: Path, keys: tuple[str, ...]) -> Mapping[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
    found, wanted = set(value) - {"format"}, set(keys)
    if found != wanted:
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
