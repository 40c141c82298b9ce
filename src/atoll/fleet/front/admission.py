"""Who is let in: edges whose keys are in the coordinator's folder, with certificates of the fleet's authority that are not revoked."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID

from atoll.fleet.files import CoordinatorFolder
from atoll.split.authority.issuer import TENANT
from atoll.split.authority.revocation import Revoked


@dataclass(frozen=True, slots=True)
class Visitor:
    """Whoever shows a certificate that the authority signed; TLS has seen to that, and that it holds today."""

    name: str
    serial: int
    since: datetime.datetime
    """From when its certificate holds."""

    @classmethod
    def of(cls, certificate: bytes) -> Visitor:
        """The visitor who shows this certificate, in DER; a name that none of the fleet has becomes empty."""
        shown = x509.load_der_x509_certificate(certificate)
        names = [str(one.value) for one in shown.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        name = names[0] if len(names) == 1 and TENANT.fullmatch(names[0]) else ""
        return cls(name, shown.serial_number, shown.not_valid_before_utc)


class Admission:
    """Reads the coordinator's folder as it is now, so that what is revoked is kept out from then on, without a restart."""

    def __init__(self, folder: CoordinatorFolder) -> None:
        self._folder, self._revoked = folder, Revoked(folder.revoked, folder.ca)

    def refusal(self, visitor: Visitor) -> str | None:
        """Why the visitor is not let in; None: it is."""
        if not visitor.name or not self._folder.node_public(visitor.name).is_file():
            return "its name is of no edge"
        return self._revoked.refusal(visitor.name, visitor.serial, visitor.since)
