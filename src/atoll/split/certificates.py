"""Whom a connection is made with: certificates read and checked before anything is opened, and made for a first try.

Without TLS only a loopback address is served or called, unless that is asked for expressly.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from atoll.errors import OutputError, TransportError
from atoll.split.transport import OPTIONS

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
VALID = datetime.timedelta(days=365)
CLOCK_SKEW = datetime.timedelta(hours=1)
"""New certificates hold from so long ago, for machines whose clock is behind."""
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EVERYWHERE = ("", "0.0.0.0", "::")
_DIRECT = ("grpc.enable_http_proxy", 0)


@dataclass(frozen=True, slots=True)
class DeviceTls:
    """What a device shows and whom it believes, as PEM files."""

    ca: Path | None
    """Who must have signed the host's certificate; None: an authority that gRPC knows."""
    cert: Path | None
    key: Path | None


@dataclass(frozen=True, slots=True)
class HostTls:
    """What a host shows and whom it believes, as PEM files."""

    cert: Path | None
    key: Path | None
    client_ca: Path | None
    """Who must have signed every device's certificate; None: devices need none."""


@dataclass(frozen=True, slots=True)
class Made:
    """Certificates that were made."""

    ca_key: Path
    """Signs further certificates; neither host nor device needs it."""
    host: HostTls
    devices: Mapping[str, DeviceTls]
    """By tenant."""


def open_channel(address: str, tls: DeviceTls, *, insecure: bool) -> grpc.Channel:
    """A channel to the host at HOST:PORT; the host is called at the first use.

    Raises: TransportError where the certificates are of no use, or TLS is missing towards another machine.
    """
    pair = _pair(tls.cert, tls.key)
    if tls.ca is None and pair is None:
        _check_plain(address, "without TLS a device speaks only to a host on its own machine", "the CA of the host's certificate", insecure)
        # A proxy named in the environment would carry plain text off this machine.
        return grpc.insecure_channel(address, options=(*OPTIONS, _DIRECT))
    key, cert = pair or (None, None)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(_authority(tls.ca), key, cert), options=OPTIONS)


def server_credentials(listen: str, tls: HostTls, *, insecure: bool) -> grpc.ServerCredentials | None:
    """What a host that listens on HOST:PORT shows and asks for; None: no TLS.

    Raises: TransportError where the certificates are of no use, or TLS is missing and other machines could connect.
    """
    pair = _pair(tls.cert, tls.key)
    if pair is not None:
        return grpc.ssl_server_credentials([pair], _authority(tls.client_ca), require_client_auth=tls.client_ca is not None)
    if tls.client_ca is not None:
        raise TransportError(
            "devices can show certificates only over TLS", where=str(tls.client_ca), got="a CA for devices, but no certificate of the host",
            expected="certificate and key of the host", do="give them too",
        )  # fmt: skip
    _check_plain(listen, "without TLS a host listens only to its own machine", "certificate and key of the host", insecure)
    return None


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT can only be this machine. Names other than localhost are not looked up: what they mean can change."""
    host = address[1:].partition("]")[0] if address.startswith("[") else address
    if not address.startswith("[") and address.count(":") == 1:
        host = address.partition(":")[0]
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def examined(cert: Path, key: Path, ca: Path) -> x509.Certificate:
    """The owner's certificate, if it holds now, the key is its own, and an authority that holds now signed it.

    Raises: TransportError.
    """
    pem, _ = _authority(ca), _pair(cert, key)
    certificate = _certificates(cert, _read(cert))[0]
    if not any(_signed(certificate, authority) for authority in _certificates(ca, pem or b"")):
        raise TransportError(
            "the certificate is not signed by this authority", where=str(cert), got=f"signed by {certificate.issuer.rfc4514_string()}",
            expected=f"a certificate that {ca} vouches for", do="give files that were made together",
        )  # fmt: skip
    return certificate


def covers(certificate: x509.Certificate, host: str) -> bool:
    """Whether who is called by this name or address may show the certificate."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    return _san(host) in names


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def make_certificates(folder: Path, hosts: Sequence[str], tenants: Sequence[str]) -> Made:
    """A certificate authority for development, the host's certificate for these names and addresses, and one for each tenant.

    Raises: TransportError for a name that no certificate can carry; OutputError where a file exists or cannot be written.
    """
    check_names(tenants, "tenant")
    issuer = Issuer("atoll development CA")
    # A host that listens on all addresses is called by its machine's name.
    called = [socket.gethostname() if host.strip("[]") in _EVERYWHERE else host for host in hosts]
    files = {**issuer.own("ca"), **issuer.server("host", "atoll host", called)}
    for tenant in tenants:
        files |= issuer.device(f"tenant-{tenant}", tenant)
    _write_all(folder, files)
    ca = folder / "ca.pem"
    devices = {tenant: DeviceTls(ca, folder / f"tenant-{tenant}.pem", folder / f"tenant-{tenant}.key") for tenant in tenants}
    return Made(folder / "ca.key", HostTls(folder / "host.pem", folder / "host.key", ca), devices)


class Issuer:
    """A new authority, which signs certificates that hold for a year from now; certificates and keys come as the contents of files."""

    def __init__(self, common_name: str) -> None:
        self._start, self._key = datetime.datetime.now(datetime.UTC) - CLOCK_SKEW, ec.generate_private_key(ec.SECP256R1())
        self._name = _name(common_name)
        self._certificate = self._sign(self._name, self._key, [
            (x509.BasicConstraints(ca=True, path_length=0), True), (_key_usage(ca=True), True),
        ])  # fmt: skip

    def own(self, stem: str) -> dict[str, bytes]:
        """The authority's own certificate and key: STEM.pem, STEM.key."""
        return {f"{stem}.pem": _pem(self._certificate), f"{stem}.key": _pem(self._key)}

    def server(self, stem: str, common_name: str, hosts: Sequence[str]) -> dict[str, bytes]:
        """STEM.pem and STEM.key of who is called by these names and addresses, or over loopback.

        Raises: TransportError for a name that no certificate can carry.
        """
        names = x509.SubjectAlternativeName([_san(name) for name in dict.fromkeys((*LOOPBACK_NAMES, *hosts))])
        return self._issue(stem, common_name, ExtendedKeyUsageOID.SERVER_AUTH, names)

    def device(self, stem: str, tenant: str) -> dict[str, bytes]:
        """STEM.pem and STEM.key of a device that a host knows as this tenant."""
        return self._issue(stem, tenant, ExtendedKeyUsageOID.CLIENT_AUTH, None)

    def _issue(self, stem: str, common_name: str, usage: ObjectIdentifier, names: x509.SubjectAlternativeName | None) -> dict[str, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(_name(common_name), key, [
            (x509.BasicConstraints(ca=False, path_length=None), True), (_key_usage(ca=False), True),
            (x509.ExtendedKeyUsage([usage]), False), *([(names, False)] if names else []),
        ])  # fmt: skip
        return {f"{stem}.pem": _pem(certificate), f"{stem}.key": _pem(key)}

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extensions: Sequence[tuple[x509.ExtensionType, bool]]
    ) -> x509.Certificate:
        builder = x509.CertificateBuilder(
            self._name, subject, key.public_key(), x509.random_serial_number(), self._start, self._start + VALID, [
                x509.Extension(x509.SubjectKeyIdentifier.oid, False, x509.SubjectKeyIdentifier.from_public_key(key.public_key())),
                x509.Extension(
                    x509.AuthorityKeyIdentifier.oid, False, x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
                ),
            ],
        )  # fmt: skip
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        key_cert_sign=ca, crl_sign=ca, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _san(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", host):
        raise TransportError(
            "a name that no certificate can carry", where="host", got=host, expected="a host name or an IP address, without a port",
            do="write names of other alphabets as xn--...",
        )  # fmt: skip
    return x509.DNSName(host)


def check_names(names: Sequence[str], kind: str) -> None:
    """Whether certificates, and files or folders of these names, can be told apart; `kind` says whose they are: "tenant".

    Raises: TransportError.
    """
    bad = [name for name in names if not _TENANT.fullmatch(name)]
    # Files of two must differ on every file system.
    bad += [name for name, count in Counter(name.lower() for name in names).items() if count > 1]
    if bad:
        raise TransportError(
            "a name must be one that a certificate and a file can carry", where=kind, got=repr(bad[0]),
            expected="1 to 64 letters, digits, dots, dashes and underscores, no two alike", do="choose another name",
        )  # fmt: skip


def _pem(thing: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(Encoding.PEM)
    return thing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write_new(path: Path, content: bytes) -> None:
    """A file that was not there before, whole or not at all; a *.key is its owner's alone from the start.

    Raises: OSError.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if path.suffix == ".key" else 0o644)
    try:
        with open(handle, "wb") as file:
            file.write(content)
    except OSError:
        path.unlink()
        raise


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """All of them or none."""
    there = [name for name in files if os.path.lexists(folder / name)]
    if there:
        raise OutputError(
            "certificates are never overwritten", where=str(folder / there[0]), got="a file", expected="no file of this name",
            do="name another folder, or move the files away",
        )  # fmt: skip
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_new(folder / name, content)
            written.append(folder / name)
    except OSError as problem:
        for path in written:
            path.unlink()
        raise OutputError(
            "certificates cannot be written", where=str(folder), got=problem.strerror or str(problem), do="name another folder"
        ) from None  # fmt: skip


def _check_plain(address: str, what: str, missing: str, insecure: bool) -> None:
    if not insecure and not is_loopback(address):
        raise TransportError(
            what, where=address, got="no certificates", expected="TLS, or a loopback address (localhost, 127.0.0.1, [::1])",
            do=f"give {missing}, or go through an SSH tunnel to localhost; --insecure allows plain text, for a network you trust",
        )  # fmt: skip


def _pair(cert: Path | None, key: Path | None) -> tuple[bytes, bytes] | None:
    """Key and certificates, in gRPC's order, as they are in the files; None where there are none."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        given, missing = ("certificate", "key") if key is None else ("key", "certificate")
        raise TransportError(
            "a certificate and its key go together", where=str(cert or key), got=f"a {given} without its {missing}",
            expected="both", do=f"give the {missing} too",
        )  # fmt: skip
    cert_pem, key_pem = _read(cert), _read(key)
    certificate = _certificates(cert, cert_pem)[0]  # The owner's comes first, those that vouch for it after.
    _check_dates(cert, [certificate])
    if _public(certificate.public_key()) != _public(_private_key(key, key_pem).public_key()):
        raise TransportError(
            "the key does not belong to the certificate", where=str(key), got="another key", expected=f"the key of {cert}",
            do="give the two files that were made together",
        )  # fmt: skip
    return key_pem, cert_pem


def _authority(ca: Path | None) -> bytes | None:
    if ca is None:
        return None
    pem = _read(ca)
    _check_dates(ca, _certificates(ca, pem))
    return pem


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise TransportError(
            "a file that TLS needs cannot be read", where=str(path), got=problem.strerror or str(problem), expected="a PEM file",
            do="mend the path, or the file's permissions",
        ) from None  # fmt: skip


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as problem:
        raise TransportError(
            "not a certificate", where=str(path), got=_first_line(problem), expected="PEM text with BEGIN CERTIFICATE",
            do="give the certificate's file; openssl x509 -inform der turns a binary one into PEM",
        ) from None  # fmt: skip


def _private_key(path: Path, pem: bytes):  # type: ignore[no-untyped-def]
    """Any kind of private key that TLS knows."""
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as problem:
        raise TransportError(
            "not a private key that can be used", where=str(path), got=_first_line(problem),
            expected="PEM text with BEGIN PRIVATE KEY, not encrypted", do="give the key's file; openssl pkey decrypts one",
        ) from None  # fmt: skip


def _public(key) -> bytes:  # type: ignore[no-untyped-def]
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _check_dates(path: Path, certificates: Sequence[x509.Certificate]) -> None:
    """At least one must hold now: bundles of authorities keep old ones."""
    now = datetime.datetime.now(datetime.UTC)
    if any(c.not_valid_before_utc <= now <= c.not_valid_after_utc for c in certificates):
        return
    first = certificates[0]
    ended = first.not_valid_after_utc < now
    raise TransportError(
        "the certificate has expired" if ended else "the certificate does not hold yet", where=str(path),
        got=f"{first.not_valid_before_utc:%Y-%m-%d} to {first.not_valid_after_utc:%Y-%m-%d}", expected=f"a span around {now:%Y-%m-%d}",
        do="get a new one" if ended else "set this machine's clock",
    )  # fmt: skip


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)
