"""An authority's own work: certificates for machines and tenants, their renewal, and the list of those that are revoked."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from atoll.errors import OutputError, TransportError
from atoll.split.authority.revocation import Listed, listed

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
VALID = datetime.timedelta(days=365)
AUTHORITY_VALID = datetime.timedelta(days=3650)
"""An authority's own certificate is on every machine, so that it is not renewed along with the others."""
CLOCK_SKEW = datetime.timedelta(hours=1)
"""New certificates hold from so long ago, for machines whose clock is behind."""
_CLOCK_TICK_SECONDS = 0.1
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Issuer:
    """An authority, which signs certificates that hold for a year from now; certificates and keys come as the contents of files."""

    def __init__(self, common_name: str, key: ec.EllipticCurvePrivateKey | None = None) -> None:
        """A new authority, or the same under a certificate of its own that holds longer, where its `key` is given."""
        self._start, self._key = datetime.datetime.now(datetime.UTC) - CLOCK_SKEW, key or ec.generate_private_key(ec.SECP256R1())
        self._name, self._end, self._listed = _name(common_name), self._start + AUTHORITY_VALID, Listed()
        self._certificate = self._sign(self._name, self._key, [
            (x509.BasicConstraints(ca=True, path_length=0), True), (_key_usage(ca=True), True),
        ], self._start)  # fmt: skip

    @classmethod
    def opened(cls, cert: Path, key: Path, crl: Path | None = None) -> Issuer:
        """The authority whose files these are; `crl`: its list of what is revoked, which may be absent.

        Raises: TransportError for files that are none.
        """
        try:
            certificate = x509.load_pem_x509_certificate(cert.read_bytes())
            private = load_pem_private_key(key.read_bytes(), password=None)
            if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != certificate.public_key():
                raise ValueError("the key is of another certificate")
        except (OSError, ValueError, TypeError) as problem:
            raise TransportError(
                "no authority that could sign", where=f"{cert}, {key}", got=str(problem) or type(problem).__name__,
                expected="ca.pem and ca.key, as they were made together", do="bring ca.key back from where it is kept",
            ) from None  # fmt: skip
        issuer = cls.__new__(cls)
        issuer._start, issuer._key = datetime.datetime.now(datetime.UTC) - CLOCK_SKEW, private
        issuer._name, issuer._end, issuer._certificate = certificate.subject, certificate.not_valid_after_utc, certificate
        issuer._listed = Listed() if crl is None else listed(crl)
        return issuer

    @property
    def end(self) -> datetime.datetime:
        """Until when its own certificate holds; nothing that it signs holds longer."""
        return self._end

    def renewed(self) -> Issuer:
        """The same authority, name and key, under a new certificate: what it signed before stays good."""
        (name,) = self._name.get_attributes_for_oid(NameOID.COMMON_NAME)
        issuer = Issuer(str(name.value), self._key)
        issuer._listed = self._listed
        return issuer

    def own(self, stem: str) -> dict[str, bytes]:
        """The authority's own certificate and key: STEM.pem, STEM.key."""
        return {f"{stem}.pem": _pem(self._certificate), f"{stem}.key": _pem(self._key)}

    def server(self, stem: str, common_name: str, hosts: Sequence[str]) -> dict[str, bytes]:
        """STEM.pem and STEM.key of who is called by these names and addresses, or over loopback.

        Raises: TransportError for a name that no certificate can carry.
        """
        names = x509.SubjectAlternativeName([general_name(name) for name in dict.fromkeys((*LOOPBACK_NAMES, *hosts))])
        return self._issue(stem, common_name, ExtendedKeyUsageOID.SERVER_AUTH, names)

    def device(self, stem: str, tenant: str) -> dict[str, bytes]:
        """STEM.pem and STEM.key of a device that a host, or a fleet's front, knows as this tenant; waits out the second of a revocation.

        Raises: TransportError where the name was revoked at a time that is still to come by this clock.
        """
        return self._issue(stem, tenant, ExtendedKeyUsageOID.CLIENT_AUTH, None, self._start_of(tenant))

    def revoked(self, serials: Iterable[int] = (), name: str | None = None) -> bytes:
        """The list (a CRL, in PEM) with these too, and all that the name was given until now; it holds as long as the authority."""
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        names = {**self._listed.names, **({} if name is None else {name: now})}
        self._listed = Listed(frozenset(self._listed.serials) | frozenset(serials), names)
        builder = x509.CertificateRevocationListBuilder(self._name, self._start, max(self._end, now))
        for serial in sorted(self._listed.serials):
            builder = builder.add_revoked_certificate(x509.RevokedCertificateBuilder(serial, now).build())
        builder = builder.add_extension(self._listed.extension(), critical=False) if names else builder
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def _start_of(self, tenant: str) -> datetime.datetime:
        """From when a certificate for the tenant holds: after all that it was given before it was revoked."""
        revoked = self._listed.names.get(tenant)
        if revoked is None:
            return self._start
        start = max(self._start, revoked + datetime.timedelta(seconds=1))
        wait_seconds = (start - datetime.datetime.now(datetime.UTC)).total_seconds()
        if wait_seconds > 1:
            raise TransportError(
                "the name was revoked at a time that is still to come", where=tenant, got=f"{revoked:%Y-%m-%d %H:%M:%S} UTC",
                expected="a time before now", do="set this machine's clock",
            )  # fmt: skip
        if wait_seconds > -_CLOCK_TICK_SECONDS:  # TLS tells the time by a clock that may be behind by as much.
            time.sleep(wait_seconds + _CLOCK_TICK_SECONDS)
        return start

    def serial_of(self, cert: Path, tenant: str) -> int:
        """The number of a tenant's certificate.

        Raises: TransportError for a file that is none, or one that this authority did not give to this tenant.
        """
        try:
            found = x509.load_pem_x509_certificate(cert.read_bytes())
            found.verify_directly_issued_by(self._certificate)
            if found.subject != _name(tenant):
                raise ValueError(f"a certificate for {found.subject.rfc4514_string()}")
        except (OSError, ValueError, TypeError, InvalidSignature) as problem:
            raise TransportError(
                "not the tenant's certificate", where=str(cert), got=str(problem) or "signed by another authority",
                expected=f"the certificate that this authority gave to {tenant}", do="give it with --certificate FILE",
            ) from None  # fmt: skip
        return found.serial_number

    def _issue(
        self, stem: str, common_name: str, usage: ObjectIdentifier, names: x509.SubjectAlternativeName | None,
        start: datetime.datetime | None = None,
    ) -> dict[str, bytes]:  # fmt: skip
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(_name(common_name), key, [
            (x509.BasicConstraints(ca=False, path_length=None), True), (_key_usage(ca=False), True),
            (x509.ExtendedKeyUsage([usage]), False), *([(names, False)] if names else []),
        ], start or self._start)  # fmt: skip
        return {f"{stem}.pem": _pem(certificate), f"{stem}.key": _pem(key)}

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extensions: Sequence[tuple[x509.ExtensionType, bool]],
        start: datetime.datetime,
    ) -> x509.Certificate:
        end = self._end if subject == self._name else min(self._start + VALID, self._end)
        builder = x509.CertificateBuilder(
            self._name, subject, key.public_key(), x509.random_serial_number(), start, end, [
                x509.Extension(x509.SubjectKeyIdentifier.oid, False, x509.SubjectKeyIdentifier.from_public_key(key.public_key())),
                x509.Extension(
                    x509.AuthorityKeyIdentifier.oid, False, x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
                ),
            ],
        )  # fmt: skip
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())


def addresses_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a server's certificate is for; none of one that has none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = names.get_values_for_type(x509.IPAddress)  # type: ignore[assignment]
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def general_name(host: str) -> x509.GeneralName:
    """A host name or an IP address as certificates carry it.

    Raises: TransportError for a name that no certificate can carry.
    """
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
    bad = [name for name in names if not TENANT.fullmatch(name)]
    # Files of two must differ on every file system.
    bad += [name for name, count in Counter(name.lower() for name in names).items() if count > 1]
    if bad:
        raise TransportError(
            "a name must be one that a certificate and a file can carry", where=kind, got=repr(bad[0]),
            expected="1 to 64 letters, digits, dots, dashes and underscores, no two alike", do="choose another name",
        )  # fmt: skip


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


def write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """All of them, none of which was there, or none.

    Raises: OutputError.
    """
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


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        key_cert_sign=ca, crl_sign=ca, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _pem(thing: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(Encoding.PEM)
    return thing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
