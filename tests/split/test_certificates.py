"""TLS between host and device: who is let in, who is not, and what is said to those who are not."""

from __future__ import annotations

import datetime
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from atoll.commands.hosts.certificates import certify, renew, revoke
from atoll.errors import BadValueError, HostLostError, OutputError, TransportError
from atoll.fleet.check import check_fleet
from atoll.jobs.split import check_access
from atoll.split.authority import issuer as issuing
from atoll.split.authority.issuer import Issuer, addresses_of
from atoll.split.authority.revocation import Listed, Revoked, listed
from atoll.split.certificates import (
    DeviceTls,
    HostAccess,
    HostTls,
    Made,
    examined,
    is_loopback,
    make_certificates,
    open_channel,
    server_credentials,
)
from atoll.split.device.exchange import Session
from atoll.split.transport import fetch_status
from atoll.wire import protocol_pb2 as pb
from atoll.wire.handshake import PROTOCOL

from tests.split.running import OPEN, PLAIN, channel_to, llama_host, running, session_on, wait_until

SECONDS = 10.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Certificates for a host and two tenants."""
    return make_certificates(tmp_path_factory.mktemp("made"), ["host.example", "10.0.0.5"], ["north", "south"])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Certificates of somebody else."""
    return make_certificates(tmp_path_factory.mktemp("foreign"), [], ["north"])


def failure(channel: grpc.Channel) -> str:
    """The page of a call that does not come through."""
    with pytest.raises(HostLostError) as caught:
        fetch_status(channel, SECONDS)
    return caught.value.page()


def exchange(session: Session) -> str:
    """The kind of the host's answer to a forward pass."""
    session.stream.send(pb.Forward(rows=2, positions=3, lengths=[3, 1]), [torch.zeros(4, 32)])
    return session.stream.receive().kind


def test_tls_without_client_certificates(made: Made) -> None:
    device = replace(made.devices["north"], cert=None, key=None)
    with running(llama_host(), tls=replace(made.host, client_ca=None)) as host, channel_to(host, device) as channel:
        assert fetch_status(channel, SECONDS).base_digest == "base"
        with session_on(channel):
            assert [session.tenant for session in host.status().open] == [""]


def test_the_tenant_is_the_name_in_the_certificate(made: Made) -> None:
    with running(llama_host(), tls=made.host) as host, channel_to(host, made.devices["south"]) as channel, session_on(channel):
        assert [session.tenant for session in host.status().open] == ["south"]


def named(*names: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name, _validate=False) for name in names])


def device_of(issuer: Issuer, folder: Path, subject: x509.Name, monkeypatch: pytest.MonkeyPatch) -> DeviceTls:
    """A device's files, signed by the authority, with any subject."""
    with monkeypatch.context() as patch:
        patch.setattr(issuing, "_name", lambda common_name: subject)
        for name, content in issuer.device("device", "").items():
            (folder / name).write_bytes(content)
    return DeviceTls(folder / "ca.pem", folder / "device.pem", folder / "device.key")


@pytest.mark.parametrize("subject", [
    named("north\n2026 session of south ended"), named("north\0.example"), named("\x1b[2J"), named("\u202ehtron"), named(),
    named("north", "south"), named(" north"), x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "north")]),
], ids=str)  # fmt: skip
def test_a_certificate_that_names_nobody_is_no_tenants(subject: x509.Name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are signed by the right authority. Of "north", a NUL and more gRPC itself tells "north"."""
    issuer = Issuer("an authority that signs what it is given")
    for name, content in {**issuer.own("ca"), **issuer.server("host", "host", [])}.items():
        (tmp_path / name).write_bytes(content)
    device = device_of(issuer, tmp_path, subject, monkeypatch)
    with running(llama_host(), tls=HostTls(tmp_path / "host.pem", tmp_path / "host.key", tmp_path / "ca.pem")) as host:
        with channel_to(host, device) as channel:
            page = failure(channel)
            assert "the certificate names nobody" in page
            assert page.replace("\n", "").isprintable()
            with pytest.raises(HostLostError, match="lost"), session_on(channel):
                pass
        assert not host.account.totals_by_tenant()
        with channel_to(host, device_of(issuer, tmp_path, named("Klinik Süd"), monkeypatch)) as channel, session_on(channel):
            assert [session.tenant for session in host.status().open] == ["Klinik Süd"]


def test_a_revoked_certificate_is_out_at_once(tmp_path: Path) -> None:
    """From the next call on, and in a session that is open; the other tenant goes on."""
    made = make_certificates(tmp_path, [], ["north", "south"])
    with (
        running(llama_host(), tls=made.host) as host, channel_to(host, made.devices["north"]) as north,
        channel_to(host, made.devices["south"]) as south, session_on(south) as other, session_on(north) as session,
    ):
        told = revoke("north", tmp_path)
        assert f"{told.crl}" in told.to_text()
        with pytest.raises(HostLostError) as caught:
            exchange(session)
        assert "its certificate is revoked" in caught.value.page()
        assert "the host does not know this device: its certificate is revoked" in failure(north)
        assert exchange(other) == "hidden"
        wait_until(lambda: [one.tenant for one in host.status().open] == ["south"])
    assert certify("north", tmp_path).tls == made.devices["north"]
    with running(llama_host(), tls=made.host) as host, channel_to(host, made.devices["north"]) as north:
        assert fetch_status(north, SECONDS).base_digest == "base"


def test_what_is_revoked_must_be_the_tenants(made: Made, foreign: Made) -> None:
    folder = made.ca_key.parent
    for cert in (folder / "tenant-south.pem", foreign.devices["north"].cert, folder / "host.key", folder / "absent.pem"):
        with pytest.raises(TransportError, match="not the tenant's certificate"):
            revoke("north", folder, cert=cert)
    assert listed(folder / "revoked.pem") == Listed()


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN X509 CRL-----\n", Issuer("another").revoked(())])
def test_a_list_that_is_no_list_lets_nobody_in(content: bytes | None, tmp_path: Path) -> None:
    made = make_certificates(tmp_path, [], ["north"])
    path = tmp_path / "revoked.pem"
    with running(llama_host(), tls=made.host) as host, channel_to(host, made.devices["north"]) as north:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert "revoked.pem" in failure(north)
    with pytest.raises(TransportError, match="cannot be used"):
        Revoked(path, tmp_path / "ca.pem").check()


def test_a_device_without_the_right_certificate_is_not_let_in(made: Made, foreign: Made) -> None:
    ca = made.devices["north"].ca
    with running(llama_host(), tls=made.host) as host:
        for device in (DeviceTls(ca, None, None), replace(foreign.devices["north"], ca=ca), OPEN):
            with channel_to(host, device) as channel:
                page = failure(channel)
            assert "the host hung up on the greeting" in page
            assert "a certificate that it trusts" in page
        assert host.account.totals().sessions == 0


def test_a_host_is_not_trusted_with_another_authority_or_name(
    made: Made, foreign: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(llama_host(), tls=made.host) as host, channel_to(host, foreign.devices["north"]) as channel:
        assert "not signed by an authority that is trusted here" in failure(channel)
    monkeypatch.setattr(issuing, "LOOPBACK_NAMES", ())
    remote_blocks = make_certificates(tmp_path, ["other.example"], ["north"])
    with running(llama_host(), tls=remote_blocks.host) as host, channel_to(host, remote_blocks.devices["north"]) as channel:
        assert "the host's certificate is not for this address" in failure(channel)


def test_tls_towards_a_host_without_it(made: Made) -> None:
    with running(llama_host()) as host:
        with channel_to(host, made.devices["north"]) as channel:
            assert "the host does not speak TLS" in failure(channel)
        address = f"127.0.0.1:{host.port}"
    channel = open_channel(address, OPEN, insecure=False)
    assert "nobody listens there" in failure(channel)
    channel.close()


@pytest.mark.parametrize("address", ["localhost:7000", "LOCALHOST:7000", "127.0.0.1:0", "127.9.9.9:1", "[::1]:7000", "::1"])
def test_loopback_needs_no_tls(address: str) -> None:
    assert is_loopback(address)
    assert server_credentials(address, PLAIN, insecure=False) is None
    open_channel(address, OPEN, insecure=False).close()


@pytest.mark.parametrize("address", [
    "0.0.0.0:7000", "[::]:7000", ":7000", "", "host.example:7000", "10.0.0.5:7000", "localhost.example:7000", "128.0.0.1:7000",
    "dns:///localhost:7000", "ipv4:127.0.0.1:7000,10.0.0.5:7000", "unix:/tmp/host",
])  # fmt: skip
def test_other_addresses_need_tls_or_consent(address: str) -> None:
    for ask in (
        lambda: server_credentials(address, PLAIN, insecure=False),
        lambda: open_channel(address, OPEN, insecure=False),
    ):
        with pytest.raises(TransportError) as caught:
            ask()
        assert (caught.value.where, caught.value.got) == (address, "no certificates")
    assert server_credentials(address, PLAIN, insecure=True) is None
    open_channel(address, OPEN, insecure=True).close()


def test_plain_text_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with running(llama_host()) as host, channel_to(host) as channel:
        assert fetch_status(channel, SECONDS).protocol == PROTOCOL


def spoilt(name: str, made: Made, foreign: Made, folder: Path) -> HostTls:
    """The host's certificates with one fault."""
    file, cert, key = folder / "file.pem", made.host.cert, made.host.key
    assert cert is not None and key is not None and foreign.host.key is not None  # noqa: PT018
    locked = load_pem_private_key(key.read_bytes(), None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    cases: dict[str, Callable[[], HostTls]] = {
        "no key": lambda: replace(made.host, key=None),
        "no certificate": lambda: replace(made.host, cert=None),
        "only a CA": lambda: HostTls(None, None, made.host.client_ca),
        "missing": lambda: replace(made.host, cert=folder / "missing.pem"),
        "missing CA": lambda: replace(made.host, client_ca=folder / "missing.pem"),
        "folder": lambda: replace(made.host, key=folder),
        "no PEM": lambda: (file.write_bytes(b"\0\1"), replace(made.host, cert=file))[1],
        "CA is no PEM": lambda: (file.write_text("words"), replace(made.host, client_ca=file))[1],
        "key is no PEM": lambda: (file.write_text("words"), replace(made.host, key=file))[1],
        "key as certificate": lambda: replace(made.host, cert=key),
        "certificate as key": lambda: replace(made.host, key=cert),
        "locked key": lambda: (file.write_bytes(locked), replace(made.host, key=file))[1],
        "another's key": lambda: replace(made.host, key=foreign.host.key),
    }
    return cases[name]()


@pytest.mark.parametrize(("name", "what"), [
    ("no key", "go together"), ("no certificate", "go together"), ("only a CA", "only over TLS"), ("missing", "cannot be read"),
    ("missing CA", "cannot be read"), ("folder", "cannot be read"), ("no PEM", "not a certificate"), ("CA is no PEM", "not a certificate"),
    ("key is no PEM", "not a private key"), ("key as certificate", "not a certificate"), ("certificate as key", "not a private key"),
    ("locked key", "not a private key"), ("another's key", "does not belong"),
])  # fmt: skip
def test_files_of_no_use_are_told_before_anything_starts(name: str, what: str, made: Made, foreign: Made, tmp_path: Path) -> None:
    host = spoilt(name, made, foreign, tmp_path)
    with pytest.raises(TransportError, match=what) as caught:
        server_credentials("127.0.0.1:0", host, insecure=True)
    assert all((caught.value.where, caught.value.got, caught.value.expected, caught.value.do))
    if name != "only a CA":
        with pytest.raises(TransportError, match=what):
            open_channel("127.0.0.1:7000", DeviceTls(host.client_ca, host.cert, host.key), insecure=True)


@pytest.mark.parametrize(("days", "what"), [(400, "has expired"), (-2, "does not hold yet")])
def test_certificates_out_of_their_time(days: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuing, "CLOCK_SKEW", datetime.timedelta(days=days))
    monkeypatch.setattr(issuing, "AUTHORITY_VALID", issuing.VALID)
    old = make_certificates(tmp_path, [], ["north"])
    with pytest.raises(TransportError, match=what):
        server_credentials("127.0.0.1:0", replace(old.host, client_ca=None), insecure=False)
    with pytest.raises(TransportError, match=what):
        open_channel("127.0.0.1:7000", replace(old.devices["north"], cert=None, key=None), insecure=False)


def test_the_hosts_certificate_is_verified_under_all_its_names(made: Made) -> None:
    ca, host = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (made.host.client_ca, made.host.cert) if path)
    sans = host.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(sans.get_values_for_type(x509.DNSName)) == {"localhost", "host.example"}
    assert set(map(str, sans.get_values_for_type(x509.IPAddress))) == {"127.0.0.1", "::1", "10.0.0.5"}
    for name in sans:
        PolicyBuilder().store(Store([ca])).build_server_verifier(name).verify(host, [])  # type: ignore[arg-type]
    assert host.not_valid_after_utc - host.not_valid_before_utc == datetime.timedelta(days=365)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature


def test_a_tenants_certificate_cannot_pose_as_the_host(made: Made) -> None:
    device = made.devices["north"]
    with running(llama_host(), tls=HostTls(device.cert, device.key, None)) as host:
        with channel_to(host, DeviceTls(device.ca, None, None)) as channel:
            assert "not signed by an authority that is trusted here" in failure(channel)
        wait_until(lambda: host.account.totals().sessions == 0)


def test_files_of_new_certificates(made: Made) -> None:
    assert made.host.key is not None
    folder = made.host.key.parent
    names = {"ca.pem", "ca.key", "host.pem", "host.key", "tenant-north.pem", "tenant-north.key", "tenant-south.pem", "tenant-south.key"}
    assert {path.name for path in folder.iterdir()} == names | {"revoked.pem", "issued.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("*.key")} == {0o600}
    for tenant, device in made.devices.items():
        assert device.cert is not None
        subject = x509.load_pem_x509_certificate(device.cert.read_bytes()).subject
        assert [name.value for name in subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [tenant]


def test_nothing_is_overwritten(made: Made, tmp_path: Path) -> None:
    there = tmp_path / "tenant-north.key"
    there.write_text("mine")
    with pytest.raises(OutputError, match="never overwritten") as caught:
        make_certificates(tmp_path, [], ["north"])
    assert caught.value.where == str(there)
    assert [path.name for path in tmp_path.iterdir()] == ["tenant-north.key"]
    with pytest.raises(OutputError, match="cannot be written"):
        make_certificates(there / "folder", [], [])


def test_what_was_written_is_taken_back_where_the_rest_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = issuing.os.open

    def full(path: Path, flags: int, mode: int) -> int:
        if path.name == "host.key":
            raise OSError(28, "No space left on device")
        return real(path, flags, mode)

    monkeypatch.setattr(issuing.os, "open", full)
    with pytest.raises(OutputError, match="cannot be written"):
        make_certificates(tmp_path, [], [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("hosts", "tenants"), [
    (["host.example:7000"], []), (["a b"], []), (["häst"], []), (["http://host"], []),
    ([], [""]), ([], ["a/b"]), ([], [".."]), ([], ["a" * 65]), ([], ["north", "North"]), ([], ["größe"]),
])  # fmt: skip
def test_names_that_no_certificate_can_carry(hosts: list[str], tenants: list[str], tmp_path: Path) -> None:
    with pytest.raises(TransportError):
        make_certificates(tmp_path, hosts, tenants)
    assert not list(tmp_path.iterdir())


def test_a_host_that_listens_everywhere_is_called_by_its_machines_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "machine")
    made = make_certificates(tmp_path, ["0.0.0.0", "[::]", ""], [])
    assert made.host.cert is not None
    cert = x509.load_pem_x509_certificate(made.host.cert.read_bytes())
    sans = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert sans.get_values_for_type(x509.DNSName) == ["localhost", "machine"]


def copied(folder: Path, to: Path) -> Path:
    """Another folder of the same authority, as somebody makes it who wants a second certificate."""
    to.mkdir()
    for name in ("ca.pem", "ca.key"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def test_all_that_a_tenant_was_ever_given_is_revoked(tmp_path: Path) -> None:
    """Also what was renewed, and what a copy of the authority's key signed, of which this folder knows nothing; others stay."""
    folder = tmp_path / "hosts"
    made = make_certificates(folder, [], ["north", "south"])
    first = tmp_path / "first"
    first.mkdir()
    for name in ("tenant-north.pem", "tenant-north.key"):
        (first / name).write_bytes((folder / name).read_bytes())
    renew(folder, "north")
    elsewhere = copied(folder, tmp_path / "copy")
    certify("north", elsewhere)
    devices = [DeviceTls(folder / "ca.pem", at / "tenant-north.pem", at / "tenant-north.key") for at in (first, elsewhere)]
    with running(llama_host(), tls=made.host) as host:
        for device in devices:
            with channel_to(host, device) as channel:
                assert fetch_status(channel, SECONDS).base_digest == "base"
        told = revoke("north", folder)
        assert len(told.serials) == 2
        assert set(told.deleted) == {folder / "tenant-north.pem", folder / "tenant-north.key"}
        assert all(str(path) in told.to_text() for path in told.deleted)
        for device in devices:
            with channel_to(host, device) as channel:
                assert "its certificate is revoked" in failure(channel)
        with channel_to(host, made.devices["south"]) as channel:
            assert fetch_status(channel, SECONDS).base_digest == "base"
        revoke("south", folder)  # The list keeps who was on it, and who is let in again is in with the new certificate only.
        certify("north", folder)
        with channel_to(host, made.devices["north"]) as channel:
            assert fetch_status(channel, SECONDS).base_digest == "base"
        with channel_to(host, devices[1]) as channel:
            assert "its certificate is revoked" in failure(channel)
    # By numbers alone, for whoever reads no names.
    crl = x509.load_pem_x509_crl((folder / "revoked.pem").read_bytes())
    assert {one.serial_number for one in crl} >= set(told.serials)


def test_names_are_revoked_as_the_slow_way_says() -> None:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    found = Listed(frozenset({7}), {"north": now})
    for name in ("north", "south", "North"):
        for serial in (7, 8):
            for since in (now - issuing.VALID, now, now + datetime.timedelta(seconds=1)):
                assert found.has(name, serial, since) == (serial == 7 or (name == "north" and since <= now))


@pytest.mark.parametrize("num_names", [1, 20, 3000])
def test_a_list_has_as_many_names_as_there_are(num_names: int, tmp_path: Path) -> None:
    issuer, path = Issuer("ca"), tmp_path / "revoked.pem"
    for number in range(num_names - 1):
        issuer._listed.names[f"tenant-{number}"] = datetime.datetime.now(datetime.UTC)  # type: ignore[index]
    path.write_bytes(issuer.revoked([5], "last"))
    assert (len(listed(path).names), set(listed(path).serials)) == (num_names, {5})


def test_a_name_that_nobody_has_is_not_revoked_by_mistake(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], ["north"])
    with pytest.raises(TransportError, match="nobody has a certificate") as caught:
        revoke("nort", tmp_path)
    assert "did you mean north?" in caught.value.do
    assert listed(tmp_path / "revoked.pem") == Listed()
    assert not revoke("nort", tmp_path, unknown=True).serials
    assert set(listed(tmp_path / "revoked.pem").names) == {"nort"}


@pytest.mark.parametrize(("name", "new"), [
    (None, {"host", "tenant-north", "tenant-south"}), ("host", {"host"}), ("south", {"tenant-south"}),
])  # fmt: skip
def test_certificates_of_a_host_are_renewed(name: str | None, new: set[str], tmp_path: Path) -> None:
    made = make_certificates(tmp_path, ["host.example"], ["north", "south", "gone"])
    revoke("gone", tmp_path)
    certs = {path.stem: path for path in tmp_path.glob("*.pem") if path.stem not in ("ca", "revoked")}
    before = {stem: path.read_bytes() for stem, path in certs.items()}
    text = renew(tmp_path, name).to_text()
    assert {stem for stem, path in certs.items() if path.read_bytes() != before[stem]} == new
    assert "gone" not in text
    for path in certs.values():
        examined(path, path.with_suffix(".key"), tmp_path / "ca.pem")
        assert stat.S_IMODE(path.with_suffix(".key").stat().st_mode) == 0o600
    sans = addresses_of(x509.load_pem_x509_certificate((tmp_path / "host.pem").read_bytes()))
    assert sans == addresses_of(x509.load_pem_x509_certificate(before["host"]))
    with running(llama_host(), tls=made.host) as host, channel_to(host, made.devices["south"]) as channel:
        assert fetch_status(channel, SECONDS).base_digest == "base"


def test_what_is_not_renewed(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], ["north"])
    with pytest.raises(TransportError, match="nobody has a certificate") as caught:
        renew(tmp_path, "norht")
    assert "did you mean north?" in caught.value.do
    with pytest.raises(OutputError, match="the tenant has a certificate") as again:
        certify("north", tmp_path)
    assert f"atoll host renew north --dir {tmp_path}" in again.value.do
    with pytest.raises(TransportError, match="nobody has a certificate"):
        renew(copied(tmp_path, tmp_path / "copy"))


def test_an_authority_in_its_last_year_is_renewed_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(issuing, "AUTHORITY_VALID", datetime.timedelta(days=100))
        made = make_certificates(tmp_path, [], ["north", "gone"])
    revoke("gone", tmp_path)
    renewal = renew(tmp_path)
    assert renewal.authority
    assert renewal.until > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=300)
    assert set(listed(tmp_path / "revoked.pem").names) == {"gone"}
    Revoked(tmp_path / "revoked.pem", tmp_path / "ca.pem").check()
    with running(llama_host(), tls=made.host) as host, channel_to(host, made.devices["north"]) as channel:
        assert fetch_status(channel, SECONDS).base_digest == "base"


def test_a_list_of_what_was_given_that_is_none(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], ["north"])
    for content in ("[]", "{", '{"north": 3}', '{"north": ["x"]}'):
        (tmp_path / "issued.json").write_text(content)
        with pytest.raises(TransportError, match="list of certificates that were given"):
            revoke("north", tmp_path)
    (tmp_path / "issued.json").unlink()
    assert len(revoke("north", tmp_path).serials) == 1


def test_the_doctor_knows_a_folder_of_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificates(tmp_path, [], ["north"])
    report = check_fleet(tmp_path)
    assert report.is_well
    assert {check.status for check in report.checks} == {"ok"}
    assert "364 days more" in report.to_text()
    revoke("north", tmp_path)
    certify("north", tmp_path)
    assert {check.status for check in check_fleet(tmp_path).checks} == {"ok"}
    with monkeypatch.context() as patch:
        patch.setattr(issuing, "VALID", datetime.timedelta(days=20))
        renew(tmp_path, "north")
    (warned,) = [check for check in check_fleet(tmp_path).checks if check.status == "warn"]
    assert warned.do == f"run `atoll host renew north --dir {tmp_path}`"
    (tmp_path / "tenant-north.key").unlink()
    assert not check_fleet(tmp_path).is_well


def test_paths_may_be_texts_and_a_host_is_no_text(tmp_path: Path) -> None:
    assert DeviceTls(ca="ca.pem", cert=None) == DeviceTls(Path("ca.pem"), None, None)  # type: ignore[arg-type]
    check_access(HostAccess("127.0.0.1:7431"))
    with pytest.raises(BadValueError, match="how a host is reached") as caught:
        check_access("127.0.0.1:7431")
    assert any("expected  an atoll.HostAccess" in note for note in caught.value.__notes__)
