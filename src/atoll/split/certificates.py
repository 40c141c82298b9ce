"""Whom a connection is made with: certificates read and checked before anything is opened, and made for a first try.

Without TLS only a loopback address is served or called, unless that is asked for expressly.
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from atoll.errors import TransportError
from atoll.split.authority.issued import ISSUED, Issued, serial_in
from atoll.split.authority.issuer import Issuer, check_names, general_name, write_all
from atoll.split.transport import OPTIONS

_EVERYWHERE = ("", "0.0.0.0", "::")
_DIRECT = ("grpc.enable_http_proxy", 0)


@dataclass(frozen=True, slots=True)
class DeviceTls:
    """What a device shows and whom it believes, as PEM files."""

    ca: Path | None = None
    """Who must have signed the host's certificate; None: an authority that gRPC knows."""
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        for name in ("ca", "cert", "key"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))  # From Python it may be a text.


def _nobody(line: str) -> None:
    """Who does not want to know."""


@dataclass(frozen=True, slots=True)
class HostAccess:
    """Where a host is, and how to prove to each other who one is."""

    address: str
    tls: DeviceTls = field(default_factory=lambda: DeviceTls(None, None, None))
    insecure: bool = False
    tell: Callable[[str], None] = _nobody
    """Told a line whenever the host lets wait, until somebody else is told."""


@dataclass(frozen=True, slots=True)
class HostTls:
    """What a host shows and whom it believes, as PEM files."""

    cert: Path | None
    key: Path | None
    client_ca: Path | None
    """Who must have signed every device's certificate; None: devices need none."""
    revoked: Path | None = None
    """The list (a CRL) of certificates by `client_ca` that are believed no more."""


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
    # No proxy reaches this machine's own loopback.
    options = (*OPTIONS, _DIRECT) if is_loopback(address) else OPTIONS
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(_authority(tls.ca), key, cert), options=options)


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
    return general_name(host) in names


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
    files = {**issuer.own("ca"), **issuer.server("host", "atoll host", called), "revoked.pem": issuer.revoked()}
    issued = Issued({})
    for tenant in tenants:
        files |= issuer.device(f"tenant-{tenant}", tenant)
        issued = issued.with_(tenant, [serial_in(files[f"tenant-{tenant}.pem"])])
    files[ISSUED] = issued.content()
    write_all(folder, files)
    ca = folder / "ca.pem"
    devices = {tenant: DeviceTls(ca, folder / f"tenant-{tenant}.pem", folder / f"tenant-{tenant}.key") for tenant in tenants}
    return Made(folder / "ca.key", HostTls(folder / "host.pem", folder / "host.key", ca, folder / "revoked.pem"), devices)


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
