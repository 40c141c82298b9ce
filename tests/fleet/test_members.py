"""`atoll fleet add`, `renew` and `remove`: what changes, for whom, and that the front obeys."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509

from atoll.commands.hosts.certificates import certify
from atoll.errors import AtollError, CommandLineError, ConflictError, FleetFolderError, OutputError, TransportError
from atoll.fleet.check import check_fleet
from atoll.fleet.files import CoordinatorFolder, EdgeFolder
from atoll.fleet.front.admission import Admission, Visitor
from atoll.fleet.members import COORDINATOR, add, remove, renew
from atoll.split.authority import issuer as issuing
from atoll.split.certificates import covers, examined, make_certificates

EAST = '\n[[edge]]\nname = "east"\ndata = "east.csv"\n'


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def visitor(path: Path) -> Visitor:
    return Visitor(EdgeFolder(path.parent).path.name, certificate(path).serial_number, certificate(path).not_valid_before_utc)


def edge(folder: Path, name: str) -> EdgeFolder:
    return EdgeFolder(folder / "edges" / name)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def with_east(folder: Path) -> Path:
    """A run.toml in which there is one edge more."""
    path = folder.parent / "more.toml"
    path.write_text((folder.parent / "run.toml").read_text() + EAST)
    return path


def test_an_edge_is_added(folder: Path, with_east: Path) -> None:
    change = add(folder, "east", config=with_east)
    coordinator, east = CoordinatorFolder(folder / COORDINATOR), edge(folder, "east")
    assert coordinator.read().edges == ("north", "south", "west", "east")
    assert coordinator.node_public("east").read_bytes() == east.node_public.read_bytes()
    assert {path.read_bytes() for path in folder.rglob("run.toml")} == {with_east.read_bytes()}
    assert east.read().superlink == coordinator.read().address
    examined(east.cert, east.key, coordinator.ca)
    assert {stat.S_IMODE(path.stat().st_mode) for path in east.path.glob("*.key")} == {0o600}
    assert Admission(coordinator).refusal(visitor(east.cert)) is None
    assert change.copies["edges/east"] == ["the whole folder"]
    assert change.copies["edges/north"] == ["run.toml"]
    assert not [check for check in check_fleet(folder).checks if check.name.startswith("edges/east") and check.name.endswith("agreement")
                and check.status != "ok"]  # fmt: skip


def test_an_edge_is_removed_and_may_come_again(folder: Path) -> None:
    coordinator, north = CoordinatorFolder(folder / COORDINATOR), edge(folder, "north")
    first = visitor(north.cert)
    renew(folder, "north")
    second, admission = visitor(north.cert), Admission(coordinator)
    assert first.serial != second.serial
    assert (admission.refusal(first), admission.refusal(second)) == (None, None)
    (north.path / "north.csv").write_text("rows")
    change = remove(folder, "north")
    assert "2 certificates revoked" in change.done
    assert admission.refusal(first) == admission.refusal(second) == "its name is of no edge"
    assert coordinator.read().edges == ("south", "west")
    assert not north.node_key.exists()
    assert (north.path / "north.csv").exists(), "what the edge itself had is its own"
    assert admission.refusal(visitor(edge(folder, "west").cert)) is None
    add(folder, "north", config=folder.parent / "run.toml")
    assert admission.refusal(visitor(north.cert)) is None
    assert admission.refusal(first) == admission.refusal(second) == "its certificate is revoked"
    remove(folder, "north")
    remove(folder, "west")
    for reader in (folder / COORDINATOR, folder / "hosts" / "gpu"):
        assert len(list(x509.load_pem_x509_crl((reader / "revoked.pem").read_bytes()))) == 4


@pytest.mark.parametrize("name", ["north", "gpu", COORDINATOR, None])
def test_certificates_are_renewed_for_the_same_addresses(name: str | None, folder: Path) -> None:
    paths = {path.parent.name: path for path in folder.rglob("*.pem") if path.stem in ("client", "host", "superlink")}
    before = {who: certificate(path) for who, path in paths.items()}
    change = renew(folder, name)
    after = {who: certificate(path) for who, path in paths.items()}
    assert {who for who in paths if after[who] != before[who]} == ({name} if name else set(paths))
    for who, path in paths.items():
        assert path.with_suffix(".key").stat().st_mode & 0o077 == 0
        assert examined(path, path.with_suffix(".key"), folder / "ca.pem") == after[who]
        assert after[who].subject == before[who].subject
    assert covers(after["coordinator"], "127.0.0.1")
    assert len(change.copies) == (1 if name else len(paths))


def test_an_authority_that_ends_is_renewed_and_what_it_signed_stays_good(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuing, "AUTHORITY_VALID", datetime.timedelta(days=100))
    renewed = issuing.Issuer.opened(folder / "ca.pem", folder / "ca.key").renewed()  # Which ends in a hundred days.
    for path in folder.rglob("ca.pem"):
        path.write_bytes(renewed.own("ca")["ca.pem"])
    north = edge(folder, "north")
    old = north.cert.read_bytes()
    renew(folder, "north")
    assert certificate(north.cert).not_valid_after_utc <= renewed.end, "nothing holds longer than who signed it"
    monkeypatch.undo()
    remove(folder, "west")
    change = renew(folder)
    assert {path.read_bytes() for path in folder.rglob("ca.pem")} == {(folder / "ca.pem").read_bytes()}
    assert certificate(folder / "ca.pem").not_valid_after_utc > renewed.end
    assert all("ca.pem" in names for names in change.copies.values())
    certificate_of_old = x509.load_pem_x509_certificate(old)
    certificate_of_old.verify_directly_issued_by(certificate(folder / "ca.pem"))
    admission = Admission(CoordinatorFolder(folder / COORDINATOR))
    assert admission.refusal(visitor(north.cert)) is None
    assert len(list(x509.load_pem_x509_crl((folder / COORDINATOR / "revoked.pem").read_bytes()))) == 1


@pytest.mark.parametrize(("do", "kind", "says"), [
    (lambda folder: add(folder, "north"), TransportError, "no two alike"),
    (lambda folder: add(folder, "../east"), TransportError, "no two alike"),
    (lambda folder: add(folder, "east", config=folder.parent / "run.toml"), ConflictError, "does not know this edge"),
    (lambda folder: add(folder, "east", config=folder.parent / "more.toml", host="10.0.0.7:1"), CommandLineError, "10.0.0.7:1"),
    (lambda folder: add(folder, "east", config=folder.parent / "more.toml", host="no"), TransportError, "no address"),
    (lambda folder: add(folder, "east", config=folder.parent / "split.toml"), CommandLineError, "no host"),
    (lambda folder: remove(folder, "east"), FleetFolderError, "cannot be removed"),
    (lambda folder: renew(folder, "east"), FleetFolderError, "nobody in this fleet"),
    (lambda folder: renew(folder, "north", ca_key=folder / "ca.pem"), TransportError, "no authority"),
    (lambda folder: renew(folder / "hosts"), FleetFolderError, "not a folder of a fleet"),
    (lambda folder: renew(folder, "north", ca_key=folder / "away.key"), TransportError, "no authority"),
])  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_written(
    do: object, kind: type[AtollError], says: str, folder: Path, with_east: Path
) -> None:
    (folder.parent / "split.toml").write_text(with_east.read_text() + 'mode = "split"\n')
    before = contents(folder)
    with pytest.raises(kind) as caught:
        do(folder)  # type: ignore[operator]
    assert says in caught.value.page()
    assert contents(folder) == before


def test_the_last_edge_stays(folder: Path) -> None:
    for name in ("south", "west"):
        remove(folder, name)
    with pytest.raises(FleetFolderError, match="cannot be removed"):
        remove(folder, "north")


def test_the_authoritys_key_may_be_elsewhere(folder: Path, tmp_path: Path) -> None:
    key = (folder / "ca.key").rename(tmp_path / "kept.key")
    renew(folder, "north", ca_key=key)
    assert not (folder / "ca.key").exists()


def test_a_tenant_is_certified_by_a_hosts_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path / "tls", ["127.0.0.1"], ["north"])
    made = certify("guest", tmp_path / "tls")
    assert made.tls.cert is not None
    assert made.tls.key is not None
    assert examined(made.tls.cert, made.tls.key, tmp_path / "tls" / "ca.pem").subject.rfc4514_string() == "CN=guest"
    assert made.tls.key.stat().st_mode & 0o077 == 0
    assert "--cert tenant-guest.pem" in made.to_text()
    with pytest.raises(OutputError):
        certify("north", tmp_path / "tls")
    with pytest.raises(TransportError):
        certify("a/b", tmp_path / "tls")
