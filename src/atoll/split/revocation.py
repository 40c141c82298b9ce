"""Certificates that are believed no more: an authority's list of them (a CRL), read as it is now."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cryptography import x509

from atoll.errors import TransportError


class Revoked:
    """The list at `path`, by the authority whose certificate is at `ca`; read again when the file changes, so that no restart is needed."""

    def __init__(self, path: Path, ca: Path) -> None:
        self.path, self._ca = path, ca
        self._read: tuple[int, int, int] | None = None
        self._serials: Collection[int] = ()
        self._problem = ""

    def refusal(self, serial: int) -> str | None:
        """Why a certificate of this number is not believed; None: it is. By a list that is missing or damaged none is."""
        self._refresh()
        return self._problem or ("its certificate is revoked" if serial in self._serials else None)

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
            self._serials, self._problem, self._read = *_serials(self.path, self._ca), state


def listed(path: Path) -> set[int]:
    """The numbers of certificates on a list of one's own; none where there is no file.

    Raises: TransportError for a file that is no list.
    """
    try:
        return {one.serial_number for one in x509.load_pem_x509_crl(path.read_bytes())} if path.exists() else set()
    except (OSError, ValueError) as problem:
        raise TransportError(
            "the list of revoked certificates cannot be read", where=str(path), got=str(problem), expected="a CRL in PEM",
            do="bring it back from a copy",
        ) from None  # fmt: skip


def _serials(path: Path, ca: Path) -> tuple[Collection[int], str]:
    """The numbers on the list, or what is wrong with it."""
    try:
        found = x509.load_pem_x509_crl(path.read_bytes())
        keys = [authority.public_key() for authority in x509.load_pem_x509_certificates(ca.read_bytes())]
        if any(found.is_signature_valid(key) for key in keys):  # type: ignore[arg-type]
            return frozenset(one.serial_number for one in found), ""
        return (), f"{path.name} is of another authority"
    except (OSError, ValueError, TypeError):
        return (), f"{path.name} is damaged"
