"""Certificates that are believed no more: an authority's list of them (a CRL), read as it is now.

The list has numbers of certificates, as every CRL, and in an extension names: of such a name none is believed that was given until a
certain moment, also one that nobody kept the number of.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ObjectIdentifier

from atoll.errors import TransportError
from atoll.parsed import parse_json

NAMES = ObjectIdentifier("2.25.158474906173624981345087712930668125387")
"""Of the extension: a UTF8String with JSON, from each name to the second (since 1970) until when its certificates are believed no more.
Not critical: whoever does not know it goes by the numbers."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What a list says."""

    serials: Collection[int] = frozenset()
    names: Mapping[str, datetime.datetime] = field(default_factory=dict)
    """Until when certificates were given to each of these that are believed no more."""

    def has(self, name: str, serial: int, since: datetime.datetime | None) -> bool:
        """Whether a certificate for this name, which holds from then on, is believed no more."""
        return serial in self.serials or (name in self.names and (since is None or since <= self.names[name]))

    def extension(self) -> x509.UnrecognizedExtension:
        """The names, as the list carries them."""
        text = json.dumps({name: int(until.timestamp()) for name, until in sorted(self.names.items())}).encode()
        size = len(text).to_bytes((len(text).bit_length() + 7) // 8, "big")
        return x509.UnrecognizedExtension(NAMES, b"\x0c" + (size if len(text) < 128 else bytes([0x80 | len(size)]) + size) + text)


class Revoked:
    """The list at `path`, by the authority whose certificate is at `ca`; read again when the file changes, so that no restart is needed."""

    def __init__(self, path: Path, ca: Path) -> None:
        self.path, self._ca = path, ca
        self._read: tuple[int, int, int] | None = None
        self._listed = Listed()
        self._problem = ""

    def refusal(self, name: str, serial: int, since: datetime.datetime | None) -> str | None:
        """Why a certificate for this name, of this number, from then on, is not believed; None: it is. By a damaged list none is."""
        self._refresh()
        return self._problem or ("its certificate is revoked" if self._listed.has(name, serial, since) else None)

    def check(self) -> None:
        """Raises: TransportError for a list that is missing, damaged or of another authority."""
        self._refresh()
        if self._problem:
            raise TransportError(
                "the list of revoked certificates cannot be used", where=str(self.path), got=self._problem,
                expected=f"a CRL in PEM, signed by the authority of {self._ca}", do="bring it back from where ca.key is kept",
            )  # fmt: skip

    def _refresh(self) -> None:
        try:
            found = self.path.stat()
        except OSError as problem:
            self._read, self._problem = None, f"{self.path.name} cannot be read: {problem.strerror}"
            return
        state = (found.st_mtime_ns, found.st_size, found.st_ino)
        if state != self._read:
            self._listed, self._problem, self._read = *_signed_list(self.path, self._ca), state


def listed(path: Path) -> Listed:
    """What is on a list of one's own; nothing where there is no file.

    Raises: TransportError for a file that is no list.
    """
    try:
        return _listed(x509.load_pem_x509_crl(path.read_bytes())) if path.exists() else Listed()
    except (OSError, ValueError) as problem:
        raise TransportError(
            "the list of revoked certificates cannot be read", where=str(path), got=str(problem), expected="a CRL in PEM",
            do="bring it back from a copy",
        ) from None  # fmt: skip


def _signed_list(path: Path, ca: Path) -> tuple[Listed, str]:
    """What is on the list, or what is wrong with it."""
    try:
        found = x509.load_pem_x509_crl(path.read_bytes())
        keys = [authority.public_key() for authority in x509.load_pem_x509_certificates(ca.read_bytes())]
        if any(found.is_signature_valid(key) for key in keys):  # type: ignore[arg-type]
            return _listed(found), ""
        return Listed(), f"{path.name} is of another authority"
    except (OSError, ValueError, TypeError):
        return Listed(), f"{path.name} is damaged"


def _listed(crl: x509.CertificateRevocationList) -> Listed:
    """Raises: ValueError for names that cannot be read."""
    serials = frozenset(one.serial_number for one in crl)
    try:
        value = crl.extensions.get_extension_for_oid(NAMES).value
    except x509.ExtensionNotFound:
        return Listed(serials)
    content = value.public_bytes() if not isinstance(value, x509.UnrecognizedExtension) else value.value
    names = parse_json(content[2 + (content[1] & 0x7F if content[1] & 0x80 else 0) :].decode())
    if not isinstance(names, dict) or not all(type(second) is int for second in names.values()):
        raise ValueError("names without times")
    return Listed(serials, {name: datetime.datetime.fromtimestamp(second, datetime.UTC) for name, second in names.items()})
