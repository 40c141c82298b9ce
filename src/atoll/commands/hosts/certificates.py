"""atoll host certify, renew and revoke: what the authority of a host's tenants signs, and what is to be believed no more. Without torch."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from atoll.errors import OutputError, TransportError
from atoll.runs.files import write_bytes
from atoll.split.authority.issued import ISSUED, Issued, serial_in
from atoll.split.authority.issuer import VALID, Issuer, addresses_of, check_names, write_all
from atoll.split.authority.revocation import listed
from atoll.split.certificates import DeviceTls

HOST = "host"
"""What the host itself is called where names of tenants are."""


@dataclass(frozen=True, slots=True)
class Certified:
    """What a new tenant's machine is given."""

    tenant: str
    tls: DeviceTls

    def to_text(self) -> str:
        """What to copy, and how to use it."""
        ca, cert, key = (path.name for path in (self.tls.ca, self.tls.cert, self.tls.key) if path is not None)
        return (
            f"wrote {self.tls.cert} and {key}: they and {ca} go to {self.tenant}'s machine, and to nobody else\n"
            f"there: atoll edge RUN.toml --host HOST:PORT --ca {ca} --cert {cert} --key {key}"
        )


@dataclass(frozen=True, slots=True)
class Renewal:
    """Who has new certificates."""

    until: datetime.datetime
    host: bool
    tenants: Sequence[str]
    folder: Path
    authority: bool
    """Whether the authority's own certificate is new, too."""

    def to_text(self) -> str:
        """What to copy where."""
        lines = [f"renewed until {self.until:%Y-%m-%d}: {', '.join([*['the host'] * self.host, *self.tenants])}"]
        lines += [f"ca.pem is new, too: copy it with revoked.pem to every machine, from {self.folder}"] if self.authority else []
        lines += ["start the host again with the new host.pem and host.key (on its machine)"] if self.host else []
        lines += [f"to {name}'s machine: {self.folder / f'tenant-{name}.pem'} and tenant-{name}.key" for name in self.tenants]
        return "\n".join([*lines, "those before stay good until they end, unless `atoll host revoke` puts the tenant out"])


@dataclass(frozen=True, slots=True)
class Revocation:
    """Who is a tenant no more."""

    tenant: str
    serials: Sequence[int]
    crl: Path
    deleted: Sequence[Path]

    def to_text(self) -> str:
        """What was done, and which hosts obey."""
        known = f"; {len(self.serials)} are known by number" if self.serials else "; none is known by number"
        lines = [f"{self.tenant} is out: {self.crl} refuses every certificate that the name was given until now{known}"]
        lines += [f"deleted {', '.join(map(str, self.deleted))}"] if self.deleted else []
        return "\n".join([*lines, f"a host with --crl {self.crl} obeys at once; copy the file over those of others"])


class Authority:
    """The folder of an authority: ca.pem, what it signed, and what of it is revoked.

    Raises: TransportError where it cannot sign, or its lists cannot be read.
    """

    def __init__(self, folder: Path, ca_key: Path | None) -> None:
        self.path, self.ca, self.crl = folder, folder / "ca.pem", folder / "revoked.pem"
        self.issuer = Issuer.opened(self.ca, ca_key or folder / "ca.key", self.crl)
        self.issued = Issued.read(folder / ISSUED)

    def tenant(self, name: str) -> Path:
        """A tenant's certificate; its key is beside it."""
        return self.path / f"tenant-{name}.pem"

    def names(self) -> list[str]:
        """Those that were given certificates, as far as it is known here."""
        here = {path.stem.removeprefix("tenant-") for path in self.path.glob("tenant-*.pem")}
        return sorted(here | set(self.issued.serials))

    def record(self, serials: Mapping[str, int]) -> None:
        """Keep the numbers of certificates. Raises: OutputError."""
        for name, serial in serials.items():
            self.issued = self.issued.with_(name, [serial])
        put(self.path / ISSUED, self.issued.content())


def certify(tenant: str, folder: Path, *, ca_key: Path | None = None) -> Certified:
    """A certificate for a year by the authority whose ca.pem is in `folder`; a host with this --client-ca takes the tenant from then on.

    `ca_key`: where its key is kept; None: ca.key in the same folder.

    Raises: TransportError for a name that no certificate can carry, or an authority that cannot sign; OutputError where the tenant has one.
    """
    check_names([tenant], "tenant")
    authority = Authority(folder, ca_key)
    own = authority.tenant(tenant)
    if own.exists():
        raise OutputError(
            "the tenant has a certificate", where=str(own), got="a file", expected="no file of this name",
            do=f"for another year: atoll host renew {tenant} --dir {folder}; to put it out: atoll host revoke {tenant} --dir {folder}",
        )  # fmt: skip
    files = authority.issuer.device(own.stem, tenant)
    write_all(folder, files)
    authority.record({tenant: serial_in(files[own.name])})
    return Certified(tenant, DeviceTls(authority.ca, own, own.with_suffix(".key")))


def renew(folder: Path, name: str | None = None, *, ca_key: Path | None = None) -> Renewal:
    """New certificates and keys of the host ("host"), of a tenant, or of all and, before it ends, of the authority.

    Those they had stay good until they end. All tenants: those that were certified here and not revoked since.

    Raises: TransportError where the authority cannot sign, or for a name that has no certificate here; OutputError.
    """
    authority = Authority(folder, ca_key)
    revoked, host = listed(authority.crl), folder / "host.pem"
    tenants = [one for one in authority.names() if authority.tenant(one).exists() or authority.issued.of(one) - set(revoked.serials)]
    known = [*([HOST] if host.exists() else []), *tenants]
    if (name is not None and name not in known) or not known:
        raise TransportError(
            "nobody has a certificate here under this name", where=str(folder), got=name or "no certificates",
            expected=", ".join(known) or "host.pem, or tenants that were certified here",
            do=_near(name or "", known, "atoll host certify NAME is for a new tenant"),
        )  # fmt: skip
    with_host = host.exists() and name in (None, HOST)
    of_tenants = [one for one in tenants if name in (None, one)]
    files = authority.issuer.server("host", "atoll host", addresses_of(_certificate(host))) if with_host else {}
    soon = datetime.datetime.now(datetime.UTC) + VALID
    is_new = name is None and authority.issuer.end < soon
    if is_new:
        authority.issuer = authority.issuer.renewed()
        files |= {"ca.pem": authority.issuer.own("ca")["ca.pem"], "revoked.pem": authority.issuer.revoked()}
        files |= authority.issuer.server("host", "atoll host", addresses_of(_certificate(host))) if with_host else {}
    for one in of_tenants:
        files |= authority.issuer.device(authority.tenant(one).stem, one)
    for file, content in files.items():
        put(folder / file, content)
    if of_tenants:
        authority.record({one: serial_in(files[authority.tenant(one).name]) for one in of_tenants})
    return Renewal(min(soon, authority.issuer.end), with_host, of_tenants, folder, is_new)


def revoke(tenant: str, folder: Path, *, cert: Path | None = None, unknown: bool = False, ca_key: Path | None = None) -> Revocation:
    """Put the tenant on the list in `folder`: every certificate that its name was given until now, by whom and wherever it was issued.

    Its files in `folder` are deleted. `cert`: one more of its certificates, which is kept elsewhere. `unknown`: also a name that, as far as
    it is known in `folder`, was given none.

    Raises: TransportError where the authority cannot sign, the certificate is not by it or another tenant's, or nobody has the name;
    OutputError.
    """
    check_names([tenant], "tenant")
    authority = Authority(folder, ca_key)
    own = authority.tenant(tenant)
    here = [path for path in (cert, own) if path is not None and (path == cert or path.exists())]
    serials = authority.issued.of(tenant) | {authority.issuer.serial_of(path, tenant) for path in here}
    if not serials and not unknown:
        raise TransportError(
            "nobody has a certificate here under this name", where=str(folder), got=tenant,
            expected=", ".join(authority.names()) or "a tenant that was certified here",
            do=_near(tenant, authority.names(), "mend the name; if it is right, and its certificate is elsewhere, add --unknown"),
        )  # fmt: skip
    put(authority.crl, authority.issuer.revoked(serials, tenant))
    deleted = [path for path in (own, own.with_suffix(".key")) if path.exists()]
    for path in deleted:
        path.unlink()
    return Revocation(tenant, sorted(serials), authority.crl, deleted)


def put(path: Path, content: bytes) -> None:
    """A file in place of another, whole or not at all; a *.key is its owner's alone from the start.

    Raises: OutputError.
    """
    try:
        write_bytes(path, content, 0o600 if path.suffix == ".key" else 0o644)
    except OSError as problem:
        raise OutputError(
            "a certificate, key or list cannot be written", where=str(path), got=problem.strerror or str(problem), do="mend its permissions"
        ) from None  # fmt: skip


def _near(name: str, known: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}? Else: {otherwise}" if near else otherwise


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as problem:
        raise TransportError(
            "the host's certificate cannot be read", where=str(path), got=str(problem), expected="PEM text with BEGIN CERTIFICATE",
            do="bring it back from a copy",
        ) from None  # fmt: skip
