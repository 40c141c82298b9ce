"""Who is let in: edges whose keys are in the coordinator's folder, with certificates of the fleet's authority that are not revoked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from atoll.fleet.files import CoordinatorFolder
from atoll.split.issuer import TENANT


@dataclass(frozen=True, slots=True)
class Visitor:
    """Whoever shows a certificate that the authority signed; TLS has seen to that, and that it holds today."""

    name: str
    serial: int

    @classmethod
    def of(cls, certificate: bytes) -> Visitor:
        """The visitor who shows this certificate, in DER; a name that none of the fleet has becomes empty."""
        shown = x509.load_der_x509_certificate(certificate)
        names = [str(one.value) for one in shown.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        name = names[0] if len(names) == 1 and TENANT.fullmatch(names[0]) else ""
        return cls(name, shown.serial_number)


class Admission:
    """Reads the coordinator's folder as it is now, so that what is revoked is kept out from then on, without a restart."""

    def __init__(self, folder: CoordinatorFolder) -> None:
        self._folder = folder
        self._read: tuple[int, int, int] | None = None
        self._revoked: Collection[int] | None = ()

    def refusal(self, visitor: Visitor) -> str | None:
        """Why the visitor is not let in; None: it is."""
        if not visitor.name or not self._folder.node_public(visitor.name).is_file():
            return "its name is of no edge"
        revoked = self._list()
        if revoked is None:
            return f"{self._folder.revoked.name} is damaged"
        return "its certificate is revoked" if visitor.serial in revoked else None

    def _list(self) -> Collection[int] | None:
        """The numbers of revoked certificates; None where the list is not one of this authority. A fleet of old has none, and none are."""
        try:
            found = self._folder.revoked.stat()
        except FileNotFoundError:
            return ()
        state = (found.st_mtime_ns, found.st_size, found.st_ino)
        if state != self._read:
            self._revoked, self._read = _read(self._folder.revoked, self._folder.ca), state
        return self._revoked


def _read(path: Path, ca: Path) -> Collection[int] | None:
    try:
        found = x509.load_pem_x509_crl(path.read_bytes())
        key = x509.load_pem_x509_certificate(ca.read_bytes()).public_key()
        return frozenset(one.serial_number for one in found) if found.is_signature_valid(key) else None  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError):
        return None
