"""`atoll fleet init`: what it writes, and what it refuses."""

from __future__ import annotations

import os
import stat
import tomllib
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509.verification import PolicyBuilder, Store

from atoll.errors import AtollError, CommandLineError, ConflictError, OutputError, TransportError
from atoll.fleet import init as writing
from atoll.fleet.files import CoordinatorFolder, EdgeFile, EdgeFolder, FleetFile
from atoll.fleet.init import init

ADDRESS = "coordinator.example:7440"
HOST = "gpu=10.0.0.7:7431"
SHARED = {"run.toml", "ca.pem"}


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_machine_has_its_folder_and_no_key_of_another(run_toml: Path, tmp_path: Path) -> None:
    out = tmp_path / "fleet"
    init(run_toml, out, ADDRESS, [HOST])
    assert {path.name for path in out.iterdir()} == {"README.md", "ca.pem", "ca.key", "issued.json", "coordinator", "hosts", "edges"}
    app = {"app/pyproject.toml", "app/LICENSE", "app/atoll_app/__init__.py", "app/atoll_app/apps.py"}
    nodes = {f"nodes/{name}.pub" for name in ("north", "south", "west")}
    own = {"README.md", "superlink.pem", "superlink.key", "fleet.json", "revoked.pem"}
    assert tree(out / "coordinator") == SHARED | own | nodes | app
    assert tree(out / "hosts") == {f"gpu/{name}" for name in ("README.md", "ca.pem", "host.pem", "host.key", "revoked.pem", "start.txt")}
    for name in ("north", "south", "west"):
        keys = {"node.key", "node.pub", "client.pem", "client.key"}
        assert tree(out / "edges" / name) == SHARED | keys | {"README.md", "edge.json", "policy.toml"}
    paths = list(out.rglob("*.key"))
    assert len({path.read_bytes() for path in paths}) == len(paths) == 9
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in [out, *out.rglob("*")] if path.is_dir()} == {0o700}
    assert {path.read_bytes() for path in out.rglob("run.toml")} == {run_toml.read_bytes()}
    assert sorted(os.listdir(tmp_path)) == ["fleet", "north.json", "run.toml"]


def test_edges_know_whom_they_call(run_toml: Path, tmp_path: Path) -> None:
    init(run_toml, tmp_path / "fleet", ADDRESS, [HOST])
    assert CoordinatorFolder(tmp_path / "fleet" / "coordinator").read() == FleetFile(ADDRESS, ("north", "south", "west"))
    hosts = {"north": None, "south": "10.0.0.7:7431", "west": None}
    for name, host in hosts.items():
        assert EdgeFolder(tmp_path / "fleet" / "edges" / name).read() == EdgeFile(name, ADDRESS, host)


def test_edges_are_dealt_to_two_hosts(run_toml: Path, tmp_path: Path) -> None:
    run_toml.write_text('[plan]\npolicy = "fedpipe"\n' + run_toml.read_text().replace('placement = "local"', 'placement = "auto"'))
    init(run_toml, tmp_path / "fleet", ADDRESS, ["[fd00::7]:7431", "b=gpu.example:1:west"])
    found = {name: EdgeFolder(tmp_path / "fleet" / "edges" / name).read().host for name in ("north", "south", "west")}
    assert found == {"north": "[fd00::7]:7431", "south": "[fd00::7]:7431", "west": "gpu.example:1"}
    assert "--listen [::]:7431" in (tmp_path / "fleet" / "hosts" / "host" / "start.txt").read_text()
    assert "--listen 0.0.0.0:1 " in (tmp_path / "fleet" / "hosts" / "b" / "start.txt").read_text()


@pytest.mark.parametrize(("cert", "name"), [
    ("coordinator/superlink.pem", x509.DNSName("coordinator.example")), ("coordinator/superlink.pem", x509.DNSName("localhost")),
    ("hosts/gpu/host.pem", x509.IPAddress(IPv4Address("10.0.0.7"))),
])  # fmt: skip
def test_certificates_hold_for_the_addresses_and_for_loopback(cert: str, name: x509.GeneralName, run_toml: Path, tmp_path: Path) -> None:
    out = tmp_path / "fleet"
    init(run_toml, out, ADDRESS, [HOST])
    store = Store(x509.load_pem_x509_certificates((out / "ca.pem").read_bytes()))
    PolicyBuilder().store(store).build_server_verifier(name).verify(x509.load_pem_x509_certificate((out / cert).read_bytes()), [])
    device = x509.load_pem_x509_certificate((out / "edges" / "south" / "client.pem").read_bytes())
    device.verify_directly_issued_by(x509.load_pem_x509_certificate((out / "ca.pem").read_bytes()))
    assert device.subject.rfc4514_string() == "CN=south"


def test_node_keys_are_of_the_kind_that_flower_takes(folder: Path) -> None:
    for name in ("north", "south", "west"):
        edge = EdgeFolder(folder / "edges" / name)
        key = load_ssh_private_key(edge.node_key.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP384R1)
        assert edge.node_public.read_bytes() == CoordinatorFolder(folder / "coordinator").node_public(name).read_bytes()


def test_flower_finds_the_app(folder: Path) -> None:
    coordinator = CoordinatorFolder(folder / "coordinator")
    app = tomllib.loads((coordinator.app / "pyproject.toml").read_text())
    assert app["tool"]["flwr"]["app"]["components"] == {"serverapp": "atoll_app.apps:server", "clientapp": "atoll_app.apps:client"}
    assert app["tool"]["flwr"]["app"]["config"] == {"config": "", "out": "", "resume": False}


def test_the_readme_says_what_each_machine_needs_and_how_it_starts(run_toml: Path, tmp_path: Path) -> None:
    init(run_toml, tmp_path / "fleet", ADDRESS, [HOST])
    text = (tmp_path / "fleet" / "README.md").read_text()
    machines = {part.partition(":")[0]: part for part in text.split("\n## ")[1:]}
    assert list(machines) == ["hosts/gpu", "coordinator", "edges/north", "edges/south", "edges/west"]
    named = {name: [line for line in part.splitlines() if line.startswith("- ")] for name, part in machines.items()}
    profile = "- profile: `north.json`"
    assert named == {
        "hosts/gpu": [], "coordinator": [profile, "- held-out rows: `held/out.csv`"], "edges/north": [profile, "- rows: `north.csv`"],
        "edges/south": [profile, "- rows: `south.csv`"], "edges/west": [profile, "- all edges' rows: `all.csv`"],
    }  # fmt: skip
    assert "atoll train run.toml --engine flower --fleet ." in machines["coordinator"]
    assert "atoll fleet join ." in machines["edges/west"]
    start = (tmp_path / "fleet" / "hosts" / "gpu" / "start.txt").read_text()
    assert start in machines["hosts/gpu"]
    command, _, limits = start.partition(" --max-part ")
    assert command.endswith(" --listen 0.0.0.0:7431 --tls-cert host.pem --tls-key host.key --client-ca ca.pem --crl revoked.pem")
    assert limits == "1,0 --max-tokens 8192 --max-tenant-sessions 2 --max-sessions 16\n"


def test_start_commands_are_printed_in_their_order(run_toml: Path, tmp_path: Path) -> None:
    lines = init(run_toml, tmp_path / "fleet", ADDRESS, [HOST]).to_text().splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == ["gpu", "coordinator", "north", "south", "west"]
    assert lines[0].startswith(f"wrote {tmp_path / 'fleet'}")
    assert lines[-1] == f"check:  atoll doctor --fleet {tmp_path / 'fleet'}"


def refused(kind: type[AtollError], run_toml: Path, out: Path, address: str = ADDRESS, hosts: tuple[str, ...] = (HOST,)) -> str:
    """The page; nothing was written."""
    before = sorted(path for path in run_toml.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        init(run_toml, out, address, list(hosts))
    assert sorted(path for path in run_toml.parent.rglob("*")) == before
    assert caught.value.do
    return caught.value.page()


@pytest.mark.parametrize(("was", "becomes", "kind", "says"), [
    ("[[edge]]", "#", ConflictError, "a fleet needs edges"),
    ('name = "west"', 'name = "north"', ConflictError, "same name"),
    ('name = "west"', 'name = "North"', TransportError, "where     edge"),
    ('placement = "local"', 'compare = ["central"]', ConflictError, "rows stay where they are"),
    ('placement = "local"', 'placement = "cloud"', ConflictError, "rows stay where they are"),
    ('mode = "split"', 'mode = "cloud"', ConflictError, '"cloud": south'),
])  # fmt: skip
def test_runs_that_no_fleet_can_do(was: str, becomes: str, kind: type[AtollError], says: str, run_toml: Path, tmp_path: Path) -> None:
    text = run_toml.read_text()
    # Without edges nothing may be left of them, either.
    run_toml.write_text(text.partition("[[edge]]")[0] if was == "[[edge]]" else text.replace(was, becomes))
    assert says in refused(kind, run_toml, tmp_path / "fleet")


@pytest.mark.parametrize("address", [
    "", "7440", "host", "host:", "host:0", "host:65536", "host:x", "a b:1", "http://host:1", "0.0.0.0:1", "[::]:1", "::1:1", "[host]:1",
    "10.0.0.1.5:1", "10.0.0.300:1", "häst:1",
])  # fmt: skip
def test_addresses_that_are_none(address: str, run_toml: Path, tmp_path: Path) -> None:
    assert "no address" in refused(TransportError, run_toml, tmp_path / "fleet", address)


@pytest.mark.parametrize(("hosts", "kind", "says"), [
    ((), CommandLineError, "no host for south"),
    (("gpu",), CommandLineError, "cannot be understood"),
    (("gpu=10.0.0.7:x",), TransportError, "no address"),
    (("=10.0.0.7:1",), TransportError, "where     host"),
    (("a/b=10.0.0.7:1",), TransportError, "where     host"),
    (("a=10.0.0.7:1:south", "A=10.0.0.8:1"), TransportError, "where     host"),
    (("a=10.0.0.7:1:south", "b=10.0.0.7:1:south"), CommandLineError, "10.0.0.7:1 twice"),
    ((f"a={ADDRESS}",), CommandLineError, f"{ADDRESS} twice"),
    (("a=10.0.0.7:1:south", "b=10.0.0.8:1:south"), CommandLineError, "edge south twice"),
    (("a=10.0.0.7:1", "b=10.0.0.8:1"), CommandLineError, "two hosts without edges"),
    (("a=10.0.0.7:1:south", "b=10.0.0.8:1"), CommandLineError, "host b, which no edge uses"),
    (("a=10.0.0.7:1:south,north",), CommandLineError, "edge 'north'"),
    (("a=10.0.0.7:1:south,east",), CommandLineError, "edge 'east'"),
    (("a=10.0.0.7:1:",), CommandLineError, "edge ''"),
])  # fmt: skip
def test_hosts_that_do_not_go_with_the_edges(
    hosts: tuple[str, ...], kind: type[AtollError], says: str, run_toml: Path, tmp_path: Path
) -> None:
    assert says in refused(kind, run_toml, tmp_path / "fleet", hosts=hosts)


def test_a_host_that_edges_would_not_choose(run_toml: Path, tmp_path: Path) -> None:
    run_toml.write_text(run_toml.read_text().replace('placement = "local"', "").replace('mode = "split"', ""))
    assert "host gpu, which no edge uses" in refused(CommandLineError, run_toml, tmp_path / "fleet")


def test_nothing_is_written_over(run_toml: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for out in ("full", "run.toml"):
        assert "never written over" in refused(OutputError, run_toml, tmp_path / out)
    assert "cannot be written" in refused(OutputError, run_toml, run_toml / "below")


def test_an_empty_folder_is_taken(run_toml: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    init(run_toml, tmp_path / "empty", ADDRESS, [HOST])
    assert (tmp_path / "empty" / "README.md").exists()


def test_what_was_written_is_taken_back_where_the_rest_cannot_be(run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writing.write_new

    def full(path: Path, content: bytes) -> None:
        if path.name == "host.key":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(writing, "write_new", full)
    assert "No space left" in refused(OutputError, run_toml, tmp_path / "fleet")


def test_each_folder_says_to_whoever_has_it_alone_what_to_do(run_toml: Path, tmp_path: Path) -> None:
    init(run_toml, tmp_path / "fleet", ADDRESS, [HOST])
    said = {path.parent.name: path.read_text() for path in tmp_path.glob("fleet/*/**/README.md")}
    assert set(said) == {"coordinator", "gpu", "north", "south", "west"}
    commands = {"coordinator": "atoll train run.toml --engine flower --fleet .", "gpu": "atoll host --model "}
    for name, text in said.items():
        assert f"\n       {commands.get(name, 'atoll fleet join .')}" in text
        assert "What leaves this machine" in text or name == "gpu"
        assert "atoll doctor --fleet ." in text
    for name in ("north", "south", "west"):
        assert f"rows of {name}" in said[name]
        assert ADDRESS in said[name]
        assert ("To its host, " in said[name]) == (name == "south")
    assert "`north.csv`" in said["north"]
    assert "`all.csv`" in said["west"]
    assert "`held/out.csv`" in said["coordinator"]
